# SPDX-License-Identifier: Apache-2.0
"""Cache files: they come back exactly, to the model and the prompt that they were made from and to no other."""

import dataclasses
import json
import os

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from fastprompt import patch
from fastprompt.prompts import identity
from fastprompt.prompts.cache_file import CacheOrigin, cache_path, read_cache, write_cache
from fastprompt.prompts.identity import ModelIdentity, model_sha256, tensors_sha256
from fastprompt.prompts.layout import ModelShape

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def origin_of(model, prompt):
    identity = ModelIdentity.of(model.config, model.get_input_embeddings().weight)
    [origin] = CacheOrigin.of(model, identity, {"prompt": prompt})
    return origin


@pytest.fixture
def prompt():
    return torch.randn(5, 32)


def kv(model, sites=("encoder", "cross")):
    shape = ModelShape.of(model)
    layers = {"encoder": shape.encoder_layers, "decoder": shape.decoder_layers, "cross": shape.decoder_layers}
    return {
        f"{site}_{part}": torch.randn(layers[site], 5, shape.heads, shape.head_width).to(model.dtype)
        for site in sites
        for part in "kv"
    }


@pytest.fixture
def saved(make_model, prompt, tmp_path):
    model = make_model("byt5")
    tensors, path = kv(model), tmp_path / "sst2.cache.safetensors"
    write_cache(path, tensors, origin_of(model, prompt))
    return model, tensors, path


def read(path, model, prompt, dtype=None):
    sizes = ModelShape.of(model).sizes()
    return read_cache(path, origin_of(model, prompt), dtype or model.dtype, sizes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sites", [("encoder",), ("decoder", "cross"), ("encoder", "decoder", "cross")])
def test_round_trip(dtype, sites, make_model, prompt, tmp_path):
    model = make_model("byt5", dtype=dtype)
    tensors = kv(model, sites)
    write_cache(tmp_path / "cache", tensors, origin_of(model, prompt))
    again = read(tmp_path / "cache", model, prompt)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensors[name]) and again[name].dtype == dtype for name in tensors)


def test_it_lies_beside_its_prompt(tmp_path):
    assert cache_path(tmp_path / "sst2.safetensors") == tmp_path / "sst2.cache.safetensors"
    assert cache_path("a.b") == cache_path("a.b.safetensors")


def test_the_prompt_trained_further_is_another_prompt(saved, prompt):
    model, _, path = saved
    prompt[4, 31] += 1e-6
    with pytest.raises(ValueError, match=r"another prompt, or before this one was trained further\. Make"):
        read(path, model, prompt)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.shared.weight.data[3].mul_(2), "another model .*: embedding table"),
        (lambda m: m.encoder.block[1].layer[0].SelfAttention.k.weight.data.mul_(1.01), "other weights"),
        (lambda m: m.encoder.block[0].layer[0].layer_norm.weight.data[0].mul_(2), "other weights"),
        (lambda m: nn.init.normal_(m.decoder.block[0].layer[1].EncDecAttention.v.weight), "other weights"),
    ],
)
def test_another_model_is_refused(change, message, saved, prompt):
    model, _, path = saved
    change(model)
    with pytest.raises(ValueError, match=f"{message}.* Make the cache again"):
        read(path, model, prompt)


def flip_one(weight):
    """The last bit of one element in the middle."""
    flat = weight.data.view(-1)
    middle = len(flat) // 2 + 1
    flat[middle] = torch.nextafter(flat[middle], torch.full_like(flat[middle], torch.inf))


WEIGHTS = (
    "encoder.block.0.layer.1.DenseReluDense.wi_0.weight",
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    "encoder.final_layer_norm.weight",
    "decoder.block.0.layer.1.EncDecAttention.k.weight",
    "decoder.block.0.layer.0.layer_norm.weight",
)


@pytest.mark.parametrize("name", WEIGHTS)
def test_one_bit_of_a_weight_makes_another_model(name, saved, prompt):
    model, _, path = saved
    flip_one(model.get_parameter(name))
    with pytest.raises(ValueError, match="other weights"):
        read(path, model, prompt)


def test_large_weights_are_read_to_the_end(make_model, monkeypatch):
    """In chunks, which the hash does not show."""
    model = make_model("byt5")
    whole = model_sha256(model)
    monkeypatch.setattr(identity, "_CHUNK_ELEMENTS", 100)
    assert model_sha256(model) == whole
    weight = model.encoder.block[0].layer[0].SelfAttention.k.weight.data
    for place in ((0, 0), (5, 7), (-1, -1)):
        before = weight[place].clone()
        weight[place] += 1.0
        assert model_sha256(model) != whole
        weight[place] = before


@pytest.mark.parametrize(
    "special",
    [
        {"layer_norm_epsilon": 1e-3},
        {"feed_forward_proj": "gated-silu"},
        {"relative_attention_max_distance": 64},
    ],
    ids=str,
)
def test_the_same_weights_computing_otherwise_are_another_model(special, saved, prompt, make_model):
    model, _, path = saved
    other = make_model("byt5", **special)
    assert all(
        torch.equal(mine, theirs) for mine, theirs in zip(other.parameters(), model.parameters(), strict=True)
    )
    with pytest.raises(ValueError, match="other weights, their dtype, the config or an adapter differ"):
        read(path, other, prompt)


def test_what_changes_no_result_is_the_same_model(saved, prompt, make_model):
    _, tensors, path = saved
    model = make_model("byt5", attention="sdpa", dropout_rate=0.5).train()
    for each in (model, patch(model)):
        assert read(path, each, prompt).keys() == tensors.keys()


def test_adapters_make_other_models(prompt, make_model, tmp_path):
    peft = pytest.importorskip("peft")
    model = make_model("byt5").requires_grad_(False)
    plain = model_sha256(model)
    config = peft.LoraConfig(r=2, target_modules=["k", "v"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, model)
    layers = [each for each in model.modules() if isinstance(each, peft.tuners.lora.Linear)]
    seen = [plain, model_sha256(model)]
    layers[0].scale_layer(2.0)
    seen.append(model_sha256(model))
    for layer in layers:
        layer.enable_adapters(False)
    seen.append(model_sha256(model))
    assert len(set(seen)) == 4
    layers[0].scale_layer(0.5)
    for layer in layers:
        layer.enable_adapters(True)
    assert model_sha256(model) == seen[1]


def test_weights_of_several_tensors_and_weights_without_data(make_model):
    model = make_model("byt5").requires_grad_(False)
    weight = model.encoder.block[0].layer[0].SelfAttention.k.weight.data
    found = []
    for change in (0.0, 1e-6):
        inner = TwoTensor(weight.clone(), weight + change)
        model.encoder.block[0].layer[0].SelfAttention.k.weight = nn.Parameter(inner, requires_grad=False)
        found.append(model_sha256(model))
    assert found[0] != found[1]
    model.decoder.block[0].layer[1].EncDecAttention.v.to("meta")
    with pytest.raises(
        ValueError, match=r"weight 'decoder\.block\.0.*EncDecAttention\.v\.weight' has no data"
    ):
        model_sha256(model)


def test_another_dtype_is_refused(saved, prompt):
    model, _, path = saved
    with pytest.raises(ValueError, match=r"must hold torch.bfloat16, the model's dtype, got torch.float32"):
        read(path, model, prompt, torch.bfloat16)
    with pytest.raises(ValueError, match="other weights, their dtype"):
        read(path, model.bfloat16(), prompt)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"encoder_k": None}, ValueError, "keys and values together"),
        ({"encoder_k": torch.ones(3, 5, 4, 6, dtype=torch.int64)}, TypeError, r"one float dtype.*int64"),
        (
            {"encoder_k": torch.ones(3, 5, 4, 6).half()},
            TypeError,
            r"got \['torch.float16', 'torch.float32'\]",
        ),
        ({"encoder_k": torch.full((3, 5, 4, 6), torch.inf)}, ValueError, "'encoder_k' has NaN or infinity"),
        ({"encoder_k": torch.ones(3, 6, 4, 6)}, ValueError, r"\[layers, P, H, K\]"),
    ],
)
def test_what_is_no_cache_is_not_written(change, error, message, saved, prompt, tmp_path):
    model, tensors, _ = saved
    bad = {name: tensor for name, tensor in (tensors | change).items() if tensor is not None}
    with pytest.raises(error, match=f"write_cache: the cache.*{message}"):
        write_cache(tmp_path / "bad", bad, origin_of(model, prompt))
    assert not (tmp_path / "bad").exists()


def test_a_cache_of_other_sizes_and_a_prompt_file_are_refused(saved, prompt, tmp_path):
    model, tensors, path = saved
    sizes = ModelShape.of(model).sizes() | {"H": 8}
    with pytest.raises(ValueError, match=r"\[layers, P, H, K\]=\[1, 5, 8, 6\]"):
        read_cache(path, origin_of(model, prompt), model.dtype, sizes)
    save_file(tensors, tmp_path / "plain")
    with pytest.raises(
        ValueError, match=r"must be a fastprompt.cache of version 2, got None of version None"
    ):
        read(tmp_path / "plain", model, prompt)
    with pytest.raises(FileNotFoundError, match="read_cache: there is no file"):
        read(tmp_path / "nothing", model, prompt)


def test_damage_ends_in_a_value_error_or_in_finite_tensors_of_the_right_shapes(saved, prompt):
    model, tensors, path = saved
    whole, draw = path.read_bytes(), np.random.default_rng(0)
    origin, sizes = origin_of(model, prompt), ModelShape.of(model).sizes()
    for length in draw.integers(0, len(whole), 60):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="read_cache: "):
            read_cache(path, origin, model.dtype, sizes)
    refused = 0
    for _ in range(300):
        broken = bytearray(whole)
        broken[draw.integers(min(1500, len(whole)))] = draw.integers(256)
        path.write_bytes(broken)
        try:
            again = read_cache(path, origin, model.dtype, sizes)
        except (ValueError, TypeError):
            refused += 1
        else:
            assert {name: each.shape for name, each in again.items()} == {
                n: t.shape for n, t in tensors.items()
            }
            assert all(each.isfinite().all() for each in again.values())
    assert refused > 100


@pytest.mark.parametrize("model", ["{", "[" * 99_999, '{"a": 1}', json.dumps(3)])
def test_hostile_metadata(model, saved, prompt, tmp_path):
    ours, tensors, _ = saved
    save_file(tensors, tmp_path / "hostile", {"format": "fastprompt.cache", "version": "2", "model": model})
    with pytest.raises(ValueError, match=r"read_cache: .*describes its model unreadably"):
        read(tmp_path / "hostile", ours, prompt)


def test_the_origin_knows_names_shapes_and_values(prompt):
    first = tensors_sha256({"encoder": prompt, "cross": prompt + 1})
    assert tensors_sha256({"cross": prompt + 1, "encoder": prompt.clone()}) == first
    assert tensors_sha256({"encoder": prompt + 1, "cross": prompt}) != first
    assert tensors_sha256({"encoder": prompt.view(2, 80), "cross": prompt + 1}) != first
    assert tensors_sha256({"encoder": prompt.T.contiguous().T, "cross": prompt + 1}) == first
    assert [field.name for field in dataclasses.fields(CacheOrigin)][-1] == "prompt_sha256"


def test_a_failed_write_leaves_the_old_file(saved, prompt, monkeypatch):
    model, tensors, path = saved
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("no")))
    with pytest.raises(OSError, match="no"):
        write_cache(path, kv(model), origin_of(model, prompt))
    assert all(torch.equal(each, tensors[name]) for name, each in read(path, model, prompt).items())
    assert os.listdir(path.parent) == [path.name]


def test_values_that_are_not_finite_are_refused(saved, prompt):
    model, _, path = saved
    data = bytearray(path.read_bytes())
    data[-4:] = np.float32("nan").tobytes()
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"tensor '.*' has NaN or infinity\. Make the cache again"):
        read(path, model, prompt)

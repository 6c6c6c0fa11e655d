# SPDX-License-Identifier: Apache-2.0
"""save_cache and load_caches: serving begins from files with the same answers, or the file is refused."""

import pytest
import torch
from safetensors import safe_open
from torch import nn

from fastprompt.prompts import PromptConfig, cache_loading, keyed
from fastprompt.prompts.cache_file import cache_path, write_cache

CONFIGS = {
    "cached": PromptConfig(5, "cached", seed=1),
    "short": PromptConfig(2, "cached", seed=2),
    "rows": PromptConfig(4, "prefix", seed=3),
    "kv": PromptConfig(7, "prefix", parameterization="kv", sites=["decoder"], init="uniform", seed=4),
    "mlp": PromptConfig(3, "prefix", sites=["encoder", "decoder"], mlp=3, seed=5),
    "rows2": PromptConfig(5, "prepend", seed=6),
}
KEYED = [name for name in CONFIGS if name != "rows2"]
MIXED = ["mlp", "cached", "kv"]


@pytest.fixture
def tuned(make_keyed):
    return make_keyed(CONFIGS, num_decoder_layers=3)


@pytest.fixture
def saved(tuned, tmp_path):
    """The prompts' files by name, a cache beside each."""
    paths = {name: tmp_path / f"{name}.safetensors" for name in KEYED}
    for name, path in paths.items():
        tuned.save_prompt(name, path)
        tuned.save_cache(name, path)
    return paths


@pytest.fixture
def make_fresh(make_keyed, saved):
    """Another process: the model and the prompts' files."""

    def make(**special):
        fresh = make_keyed({}, **{"num_decoder_layers": 3, **special})
        for name, path in saved.items():
            fresh.load_prompt(name, path, strict=False)
        return fresh

    return make


@pytest.fixture
def computing(monkeypatch):
    """Grows when keys are computed from rows or through the encoder."""
    calls = []

    def noted(name):
        original = getattr(keyed, name)
        monkeypatch.setattr(keyed, name, lambda *args: calls.append(name) or original(*args))

    noted("run_branch")
    noted("project")
    return calls


@pytest.mark.parametrize("memory", [None, "balanced"])
@pytest.mark.parametrize("names", [*KEYED, MIXED, ["rows", "short", "cached"]], ids=str)
def test_the_same_answers_and_nothing_computed(names, memory, saved, make_fresh, make_batch, computing):
    batch, fresh = make_batch("left"), make_fresh(memory=memory)
    with torch.no_grad():
        expected = fresh(**batch, prompts=names).logits
        fresh.load_caches(saved)
        computing.clear()
        found = fresh(**batch, prompts=names).logits
        assert computing == []
        torch.testing.assert_close(
            found, expected, rtol=1e-4, atol=1e-4
        )  # the files are of a model not patched


def test_those_loaded_together_are_read_where_they_lie(saved, make_fresh, make_batch, monkeypatch):
    fresh = make_fresh()
    fresh.load_caches({name: saved[name] for name in ("cached", "short", "rows")})
    [pool] = fresh._caches.pools
    assert fresh._caches.names == {"cached", "short", "rows"}
    monkeypatch.setattr(torch, "cat", None)
    selection = fresh.prompts.select(["short", "cached", "short"], 3)
    with torch.no_grad():
        keys = fresh._site_keys(selection, 1)["encoder"]
    assert keys.keys[0] is pool.keyed["encoder"].keys.keys[0]


def test_the_file_holds_the_prompts_own_rows_in_the_models_dtype(make_keyed, tmp_path):
    tuned = make_keyed(CONFIGS, num_decoder_layers=3, dtype=torch.bfloat16)
    with torch.autocast(tuned.device.type, torch.float16):
        tuned.save_cache("short", tmp_path / "short.safetensors")
    with safe_open(tmp_path / "short.cache.safetensors", "pt") as handle:
        shapes = {name: handle.get_tensor(name).shape for name in handle.keys()}  # noqa: SIM118
        assert handle.get_tensor("cross_k").dtype == torch.bfloat16
    assert shapes == {
        **{f"encoder_{part}": (2, 2, 4, 16) for part in "kv"},
        **{f"cross_{part}": (3, 2, 4, 16) for part in "kv"},
    }


def test_training_on_makes_the_cache_stale_and_its_file_refused(saved, make_fresh, make_batch, computing):
    batch, fresh = make_batch(), make_fresh()
    fresh.load_caches(saved)
    fresh(**batch, prompts="cached").loss.backward()
    with torch.no_grad():
        fresh.prompts["cached"].add_(fresh.prompts["cached"].grad, alpha=-1.0)
        computing.clear()
        after = fresh(**batch, prompts="cached").logits
        assert computing
        fresh.drop_caches()
        torch.testing.assert_close(fresh(**batch, prompts="cached").logits, after)
        fresh.load_caches({"short": saved["short"]})
        with pytest.raises(
            ValueError, match=r"cached\.cache\.safetensors was made from another prompt, or before"
        ):
            fresh.load_caches(saved)
    assert fresh._caches.names == {"short"}  # nothing that was kept is lost


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: model.shared.weight.add_(1.0), "made by another model .*: embedding table"),
        (lambda model: model.encoder.block[1].layer[0].SelfAttention.k.weight.neg_(), "other weights"),
        (lambda model: model.to(torch.bfloat16), "other weights, their dtype"),
    ],
)
@torch.no_grad()
def test_another_model_is_refused(change, message, saved, make_fresh):
    fresh = make_fresh()
    change(fresh.model)
    with pytest.raises(ValueError, match=message):
        fresh.load_caches({"rows": saved["rows"]})
    assert fresh._caches.names == set()


@pytest.mark.parametrize("name", ["cached", "rows", "kv"])
def test_keys_for_other_sites_or_of_another_length_are_refused(name, tuned, saved, make_fresh, tmp_path):
    """Whoever writes such a file can also write the right hashes."""
    fresh = make_fresh()
    [origin] = cache_loading._origins(fresh.model, fresh._identity(), [fresh.prompts[name]])
    P, layers = len(fresh.prompts[name]), {"encoder": 2, "cross": 3}
    for length, sites, message in (
        (P, ["cross"], "must hold keys for .*got \\['cross'\\]. Make the cache again: save_cache"),
        (P + 1, ["encoder", "cross"], "must have shape"),
    ):
        tensors = {
            f"{site}_{part}": torch.zeros(layers[site], length, 4, 16) for site in sites for part in "kv"
        }
        write_cache(cache_path(saved[name]), tensors, origin)
        with pytest.raises(ValueError, match=message):
            fresh.load_caches({name: saved[name]})


def test_autocast_computes_its_own(saved, make_fresh, make_batch, computing):
    batch, fresh = make_batch(), make_fresh()
    with torch.no_grad(), torch.autocast(fresh.device.type, torch.bfloat16):
        expected = fresh(**batch, prompts="cached").logits
        fresh.load_caches(saved)
        computing.clear()
        torch.testing.assert_close(fresh(**batch, prompts="cached").logits, expected)
        assert computing


def test_refusals(tuned, saved, make_fresh, tmp_path):
    with pytest.raises(ValueError, match="prompt 'rows2' is of kind 'prepend': its keys depend"):
        tuned.save_cache("rows2", tmp_path / "rows2.safetensors")
    with pytest.raises(ValueError, match="prompt 'rows2' is of kind 'prepend'"):
        tuned.load_caches({"rows2": saved["rows"]})
    for call in (lambda: tuned.save_cache("sst2", tmp_path / "a"), lambda: tuned.load_caches({"sst2": "a"})):
        with pytest.raises(ValueError, match="there is no prompt 'sst2'"):
            call()
    with pytest.raises(FileNotFoundError, match=r"there is no file .*other\.cache\.safetensors"):
        tuned.load_caches({"rows": tmp_path / "other.safetensors"})
    cache = cache_path(saved["rows"])
    cache.write_bytes(cache.read_bytes()[:-5])
    tuned.cache_prompts("rows")
    kept = tuned._caches.pools
    with pytest.raises(ValueError, match=r"rows\.cache\.safetensors"):
        tuned.load_caches(saved)
    assert tuned._caches.pools == kept


def test_the_mode_is_left_alone_and_dropout_is_off(make_keyed, make_batch, tmp_path):
    tuned = make_keyed(CONFIGS, num_decoder_layers=3, dropout_rate=0.5).train()
    assert any(isinstance(module, nn.Dropout) and module.training for module in tuned.modules())
    tuned.save_cache("cached", tmp_path / "cached.safetensors")
    assert tuned.model.encoder.training
    expected = tuned.eval()(**make_batch(), prompts="cached").logits
    tuned.load_caches({"cached": tmp_path / "cached.safetensors"})
    with torch.no_grad():
        torch.testing.assert_close(tuned(**make_batch(), prompts="cached").logits, expected)


def test_what_is_loaded_is_not_the_file_any_more(make_keyed, make_batch, tmp_path):
    """Which others may cut short or write to; a prompt of one row is not copied on the way."""
    tuned, batch = make_keyed(PromptConfig(1, "cached", init="uniform")), make_batch()
    tuned.save_cache("default", tmp_path / "p.safetensors")
    tuned.load_caches({"default": tmp_path / "p.safetensors"})
    path = tmp_path / "p.cache.safetensors"
    with torch.no_grad():
        expected = tuned(**batch).logits
        with path.open("r+b") as stream:
            stream.seek(-256, 2)  # values of the last tensor
            stream.write(bytes(256))
        assert torch.equal(tuned(**batch).logits, expected)

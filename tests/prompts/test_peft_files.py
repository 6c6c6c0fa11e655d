# SPDX-License-Identifier: Apache-2.0
"""PEFT adapter folders, read and written: the same logits on both sides, and hostile folders only refused."""

import json
import warnings

import pytest
import torch
from exactness import assert_exact
from safetensors.torch import load_file, save_file
from transformers import DynamicCache, EncoderDecoderCache

from fastprompt._cache_name import CACHE
from fastprompt.model import PromptModel
from fastprompt.prompts import PromptFile, read_prompt, write_prompt
from fastprompt.prompts.layout import ModelShape

peft = pytest.importorskip("peft")

D, P = 32, 5


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*past_key_values|.*is deprecated")
        yield


def save_adapter(model, folder, config):
    """A PEFT model with an adapter of random values as large as trained ones, saved to ``folder``."""
    theirs = peft.get_peft_model(model, config).eval()
    for parameter in theirs.prompt_encoder.parameters():
        parameter.data = torch.randn_like(parameter)
    theirs.save_pretrained(folder)
    return theirs


def prompted_from(folder, model, **which):
    ours = PromptModel(model, {})
    rows = read_prompt(folder, shape=ModelShape.of(model), **which).rows
    ours.prompts["p"] = rows.to(model.device)
    return ours


def with_prefix(model, prefix, batch):
    """The logits of HF T5 whose decoder self-attention has ``prefix`` in front of its own keys and values."""
    keys, values = (prefix.tensors[name].to(model.device) for name in ("decoder_k", "decoder_v"))
    B = len(batch["input_ids"])
    pairs = [
        tuple(x.transpose(0, 1).expand(B, -1, -1, -1) for x in kv) for kv in zip(keys, values, strict=True)
    ]
    return model(**batch, **{CACHE: EncoderDecoderCache(DynamicCache(pairs), DynamicCache())}).logits


@pytest.mark.parametrize("copies", [None, 1, 2])
def test_prompt_tuning_gives_the_same_logits(copies, make_model, make_batch, tmp_path):
    config = peft.PromptTuningConfig(
        task_type="SEQ_2_SEQ_LM", num_virtual_tokens=P, num_transformer_submodules=copies
    )
    theirs = save_adapter(make_model(), tmp_path, config)
    assert len(load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"]) == (
        P if copies == 1 else 2 * P
    )
    batch = make_batch()
    ours = prompted_from(tmp_path, make_model())
    assert_exact(ours(**batch).logits, theirs(**batch).logits)


@pytest.mark.parametrize("reparameterization", ["MLP", "LSTM"])
def test_p_tuning_is_read_as_the_table_that_its_network_made(
    reparameterization, make_model, make_batch, tmp_path, monkeypatch
):
    # With TF32 the network's rows would depend on how many examples a GPU runs it for.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    config = peft.PromptEncoderConfig(
        task_type="SEQ_2_SEQ_LM",
        num_virtual_tokens=P,
        encoder_hidden_size=16,
        encoder_reparameterization_type=reparameterization,
        encoder_dropout=0.0,
    )
    theirs = save_adapter(make_model(), tmp_path, config)
    batch = make_batch()
    ours = prompted_from(tmp_path, make_model())
    assert_exact(ours(**batch).logits, theirs(**batch).logits)


@pytest.mark.parametrize("task", [0, 2])
def test_multitask_gives_one_prompt_per_task(task, make_model, make_batch, tmp_path):
    # With two submodules PEFT's forward puts prompts in front of the decoder's input too, and its generate does not.
    config = peft.MultitaskPromptTuningConfig(
        task_type="SEQ_2_SEQ_LM", num_virtual_tokens=P, num_tasks=3, num_ranks=2, num_transformer_submodules=1
    )
    theirs = save_adapter(make_model(), tmp_path, config)
    batch = make_batch()
    task_ids = torch.full((len(batch["input_ids"]),), task, device=batch["input_ids"].device)
    # PEFT's base model takes the decoder's input from the labels.
    expected = theirs(**batch, task_ids=task_ids).logits
    ours = prompted_from(tmp_path, make_model(), task=task)
    assert_exact(ours(**batch).logits, expected)
    with pytest.raises(ValueError, match="task must be an int from 0 to 2, got None"):
        read_prompt(tmp_path)
    with pytest.raises(ValueError, match="task must be an int from 0 to 2, got 3"):
        read_prompt(tmp_path, task=3)
    with pytest.raises(ValueError, match="task is read only with a PEFT adapter's folder, got a PromptFile"):
        prompted_from(tmp_path, make_model(), task=task).load_prompt(
            "b", read_prompt(tmp_path, task=0), task=1
        )


def test_multitask_with_two_submodules_generates_alike(make_model, make_batch, tmp_path):
    config = peft.MultitaskPromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=P)
    theirs = save_adapter(make_model(), tmp_path, config)
    batch = make_batch()
    batch.pop("labels")
    how = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    task_ids = batch["input_ids"].new_zeros(len(batch["input_ids"]))
    expected = theirs.generate(**batch, task_ids=task_ids, **how)
    ours = prompted_from(tmp_path, make_model()).generate(**batch, **how)
    assert torch.equal(ours.sequences, expected.sequences)
    torch.testing.assert_close(ours.logits, expected.logits, rtol=1e-4, atol=1e-4)


def prefix_config(model, **special):
    shape = ModelShape.of(model)
    sizes = {"num_attention_heads": shape.heads, "token_dim": shape.heads * shape.head_width}
    return peft.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=P, **(sizes | special))


# (encoder layers, decoder layers): an even number, whose halves share; an odd one, where none do; and a decoder that
# leaves some of the file unread.
@pytest.mark.parametrize("layers", [(2, 2), (4, 4), (3, 3), (4, 3), (5, 2), (1, 1)])
@pytest.mark.parametrize("layout", ["t5", "v1_1"])  # v1_1: H * K is not d_model
def test_a_prefix_gives_the_same_logits(layout, layers, make_model, make_batch, tmp_path):
    sizes = {"num_layers": layers[0], "num_decoder_layers": layers[1]}
    model = make_model(layout, **sizes)
    theirs = save_adapter(make_model(layout, **sizes), tmp_path, prefix_config(model))
    batch = make_batch()
    prefix = read_prompt(tmp_path, shape=ModelShape.of(model))
    assert (prefix.kind, prefix.parameterization) == ("prefix", "kv")
    assert prefix.tensors["decoder_k"].shape == (layers[1], P, model.config.num_heads, model.config.d_kv)
    expected = theirs(**batch).logits
    torch.testing.assert_close(with_prefix(model, prefix, batch), expected, rtol=1e-5, atol=1e-5)
    assert (expected - model(**batch).logits).abs().max() > 0.01  # the prefix does something


def test_a_prefix_with_a_projection_is_read_as_what_it_made(make_model, make_batch, tmp_path):
    config = prefix_config(make_model(), prefix_projection=True, encoder_hidden_size=16)
    theirs = save_adapter(make_model(), tmp_path, config)
    batch, model = make_batch(), make_model()
    logits = with_prefix(model, read_prompt(tmp_path), batch)
    torch.testing.assert_close(logits, theirs(**batch).logits, rtol=1e-5, atol=1e-5)


def test_a_written_prompt_is_loaded_by_peft(make_model, make_batch, tmp_path):
    ours = PromptModel(make_model(), {})
    ours.prompts["p"] = torch.randn(P, D, device=ours.device)
    write_prompt(tmp_path, PromptFile(ours.prompts["p"]), format="peft")
    assert torch.equal(read_prompt(tmp_path).rows, ours.prompts["p"].detach().cpu())
    theirs = peft.PeftModel.from_pretrained(make_model(), tmp_path).eval()
    batch = make_batch()
    torch.testing.assert_close(theirs(**batch).logits, ours(**batch).logits, rtol=1e-5, atol=1e-5)
    batch.pop("labels")
    answers = ours.generate(**batch, max_new_tokens=6, do_sample=False)
    assert torch.equal(theirs.generate(**batch, max_new_tokens=6, do_sample=False), answers)


@pytest.mark.parametrize("layers", [(2, 2), (4, 4), (3, 3), (2, 5), (5, 2)])
def test_a_written_prefix_is_loaded_by_peft(layers, make_model, make_batch, tmp_path):
    sizes = {"num_layers": layers[0], "num_decoder_layers": layers[1]}
    model = make_model(**sizes)
    shape = (layers[1], P, model.config.num_heads, model.config.d_kv)  # a prefix of its own for each layer
    tensors = {"decoder_k": torch.randn(shape), "decoder_v": torch.randn(shape)}
    prefix = PromptFile(tensors, "prefix", parameterization="kv")
    write_prompt(tmp_path, prefix, format="peft")
    again = read_prompt(tmp_path, shape=ModelShape.of(model))
    assert all(torch.equal(again.tensors[name], tensors[name]) for name in tensors)
    theirs = peft.PeftModel.from_pretrained(make_model(**sizes), tmp_path).eval()
    batch = make_batch()
    expected = with_prefix(model, prefix, batch)
    torch.testing.assert_close(theirs(**batch).logits, expected, rtol=1e-5, atol=1e-5)
    batch.pop("labels")
    if CACHE == "cache":
        pytest.xfail(
            "PEFT 0.21 looks for past_key_values at each step of generate, and puts its prefix there again"
        )
    how = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    answer = theirs.generate(**batch, **how)
    decoder_input = {"decoder_input_ids": answer.sequences[:, :-1]}
    expected = with_prefix(model, prefix, batch | decoder_input)
    torch.testing.assert_close(torch.stack(answer.logits, 1), expected, rtol=1e-4, atol=1e-4)


def kv(sites):
    return {f"{site}_{part}": torch.randn(2, P, 4, 12) for site in sites for part in "kv"}


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (PromptFile(torch.randn(P, D), "cached"), r"no 'cached' prompt with \['prompt'\]"),
        (
            PromptFile({"decoder": torch.randn(2, P, D)}, "prefix", parameterization="rows"),
            r"no 'prefix rows' prompt with \['decoder'\]",
        ),
        (PromptFile(kv(["encoder"]), "prefix", parameterization="kv"), "no 'prefix kv' prompt with"),
        (
            PromptFile(kv(["decoder", "cross"]), "prefix", parameterization="kv"),
            r"\['cross_k', .*'decoder_v'\]",
        ),
    ],
)
def test_what_peft_cannot_express_is_refused_by_name(prompt, message, tmp_path):
    with pytest.raises(ValueError, match=f"write_prompt: PEFT has .*{message}"):
        write_prompt(tmp_path / "adapter", prompt, format="peft")
    assert not (tmp_path / "adapter").exists()


PEFT = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2, "num_transformer_submodules": 2}
MULTI = PEFT | {"peft_type": "MULTITASK_PROMPT_TUNING"}
FACTORS = {"prompt_embeddings": (4, D), "prefix_task_cols": (3, 4, 1), "prefix_task_rows": (3, 1, D)}
PREFIX = PEFT | {"peft_type": "PREFIX_TUNING", "num_layers": 2, "num_attention_heads": 4, "token_dim": D}


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        (None, {}, "has no adapter_config.json"),
        ("{", {}, "no readable JSON"),
        ("[" * 100_000, {}, "no readable JSON"),
        ("[]", {}, "must hold a JSON object, got list"),
        (" " * 2**21 + "{}", {}, "no readable JSON"),
        (PEFT | {"peft_type": "LORA"}, {}, "must be a PROMPT_TUNING, .* adapter .* got 'LORA'"),
        (PEFT | {"num_virtual_tokens": "2"}, {}, "got 'PROMPT_TUNING' with '2'"),
        (PEFT | {"num_virtual_tokens": -2}, {"prompt_embeddings": (4, D)}, "must have shape"),
        (PEFT | {"num_transformer_submodules": 3}, {"prompt_embeddings": (6, D)}, "at most 2"),
        (PEFT, None, "no adapter_model.safetensors. Save the adapter again"),
        (PEFT, {"other": (4, D)}, r"must hold tensors \['prompt_embeddings'\], got \['other'\]"),
        (PEFT, {"prompt_embeddings": (5, D)}, r"\[4, 32\] .* got \[5, 32\]"),
        (PEFT, {"prompt_embeddings": (4, D + 1)}, r"\[4, 32\] .* got \[4, 33\]"),
        (PEFT, {"prompt_embeddings": (4, D), "mlp_head.0.weight": (4, 4)}, "must hold tensors"),
        (MULTI, {"prompt_embeddings": (4, D)}, "must hold tensors .*'prefix_task_cols'"),
        (
            MULTI,
            FACTORS | {"prefix_task_cols": (3, 3, 1)},
            r"shapes \[tasks, 4, r\] and \[tasks, r, 32\], got",
        ),
        (MULTI, FACTORS | {"prefix_task_rows": (3, 1, D + 1)}, "prefix_task_rows must have shapes"),
        (MULTI, FACTORS | {"prefix_task_cols": (4,)}, "prefix_task_cols and"),
        (
            MULTI,
            FACTORS | {"prefix_task_cols": (0, 4, 1), "prefix_task_rows": (0, 1, D)},
            "task must be an int",
        ),
        (PREFIX, {"prompt_embeddings": (2, 4 * D + 1)}, r"got \[2, 129\] for 2, 2 and 32, and 4 heads"),
        (PREFIX, {"prompt_embeddings": (3, 4 * D)}, r"got \[3, 128\] for 2, 2 and 32"),
        (PREFIX | {"num_attention_heads": 0}, {"prompt_embeddings": (2, 4 * D)}, "and 0 heads"),
        (PREFIX | {"num_attention_heads": 5}, {"prompt_embeddings": (2, 4 * D)}, "must divide token_dim"),
        (PREFIX | {"num_layers": None}, {"prompt_embeddings": (2, 4 * D)}, "for 2, 0 and 32"),
        (PREFIX | {"num_layers": 1e9}, {"prompt_embeddings": (2, 4 * D)}, "for 2, 0 and 32"),
    ],
)
def test_hostile_peft_folders(config, tensors, message, tmp_path):
    if config is not None:
        text = config if isinstance(config, str) else json.dumps(config)
        (tmp_path / "adapter_config.json").write_text(text)
    if tensors:
        values = {name: torch.zeros(shape) for name, shape in tensors.items()}
        save_file(values, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=message):
        read_prompt(tmp_path, width=D)


def test_a_product_that_overflows_is_refused(tmp_path):
    """Each factor is finite."""
    (tmp_path / "adapter_config.json").write_text(json.dumps(MULTI))
    values = {name: torch.full(shape, 1e20) for name, shape in FACTORS.items()}
    save_file(values, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="the prompt of task 1 has NaN or infinity in 2 of its 2 rows"):
        read_prompt(tmp_path, task=1)


def test_a_decoder_deeper_than_the_prefix_is_refused(make_model, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps(PREFIX))
    save_file({"prompt_embeddings": torch.zeros(2, 4 * D)}, tmp_path / "adapter_model.safetensors")
    shape = ModelShape(D, 2, 3, 4, 8)
    with pytest.raises(ValueError, match="has a prefix for 2 layers, the model's decoder has 3"):
        read_prompt(tmp_path, shape=shape)
    with pytest.raises(ValueError, match="task is read only with a multitask adapter"):
        read_prompt(tmp_path, task=0)

# SPDX-License-Identifier: Apache-2.0
"""explain says what runs, and counts what is saved as the saved-tensor hooks count it."""

import pytest
import torch
from layouts import MEMORY
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import T5Config, T5EncoderModel

from fastprompt import backend_used, explain, patch, report, unpatch
from fastprompt.testing import saved_bytes

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("act", ["relu", "gated-gelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory", MEMORY)
def test_saved_bytes_are_those_that_hooks_count(memory, dtype, act, p):
    config = T5Config(
        d_model=48,
        d_kv=16,
        num_heads=4,
        d_ff=64,
        num_layers=3,
        vocab_size=64,
        dropout_rate=p,
        feed_forward_proj=act,
    )
    model = T5EncoderModel(config).to(dtype).requires_grad_(False).train()
    patch(model, memory=memory)
    embeds = torch.randn(4, 50, 48, dtype=dtype, requires_grad=True)
    with saved_bytes(exclude=model.parameters()) as saved:
        output = model(inputs_embeds=embeds)
    counted = 4 * 50 * sum(row.saved for row in explain(model))
    table = 4 * 257 * 4  # the bias of 4 heads by distance, fp32
    seeds = 8 * (2 + 2 * 2 * 3) if p else 0
    assert counted < saved.bytes <= counted + table + seeds
    del output


@pytest.mark.parametrize("memory", MEMORY[1:])
def test_saved_bytes_of_few_queries_are_those_that_hooks_count(make, device, memory):
    decoder = patch(make().decoder, memory=memory)
    embeds = torch.randn(3, 4, 48, device=device, requires_grad=True)
    states = torch.randn(3, 17, 48, device=device)
    with saved_bytes(exclude=(*decoder.parameters(), states)) as saved:
        output = decoder(inputs_embeds=embeds, encoder_hidden_states=states, use_cache=False)
    counted = 3 * 4 * sum(row.saved for row in explain(decoder))
    assert counted < saved.bytes <= counted + 4 * 257 * 4  # and the bias
    del output


def test_a_feed_forward_layer_behind_stock_attention_saves_its_input(make):
    def saved(**options):
        return {row.saved for row in explain(patch(make(), **options)) if row.cls == "T5LayerFF"}

    assert saved() == {4}
    assert saved(attention=False) == {4 + 4 * 48}


def test_under_lean_one_block_in_four_keeps_its_attention(make):
    rows = explain(patch(make(num_layers=5, num_decoder_layers=4), memory="lean"))
    attention = {row.path: row.memory for row in rows if row.cls.endswith("Attention")}
    keeps = {path for path, memory in attention.items() if memory == "lean"}
    blocks = ("encoder.block.0", "encoder.block.4", "decoder.block.3")
    assert keeps == {path for path in attention if path.rpartition(".layer.")[0] in blocks}
    assert {memory for path, memory in attention.items() if path not in keeps} == {"minimal"}
    assert {row.memory for row in rows if row.path not in attention} == {"lean"}


def test_unpatched_rows_have_a_reason(make):
    assert {row.reason for row in explain(unpatch(make()))} == {"not patched"}
    assert {row.saved for row in explain(make())} == {None}


def test_text(make, device):
    text = str(explain(patch(make(), lm_loss=True)))
    assert "T5LayerFF " in text
    assert f"frozen_ff: rms_norm, gated_act or relu_dropout, dropout_add ({device.type}" in text
    assert "encoder.block.0.layer.1 and 4 more; memory=balanced, saves 4 bytes per token" in text
    assert "the model; memory=balanced, saves 192 bytes per token" in text
    assert text.endswith("modules run fastprompt's kernels")


def test_the_backend_named_is_the_one_that_runs(make, batch, device):
    model = patch(make())
    model(**batch(), decoder_input_ids=batch()["input_ids"])
    named = {row.cls: row.backend for row in explain(model) if row.reason is None}
    head = named.pop("Linear", None)  # a GPU's is PyTorch's
    attention = {named.pop(cls) for cls in [*named] if "Attention" in cls}
    assert attention == {"triton" if device.type == "cuda" else backend_used("t5_attention")}
    assert set(named.values()) == {backend_used("rms_norm")}
    assert head == (backend_used("frozen_linear") if device.type == "cpu" else None)


def test_backends_are_those_of_the_model_s_device(make, monkeypatch):
    """Dropout, which has no weights, too."""
    model, devices = patch(make()), set()
    with FakeTensorMode():
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                fake = torch.empty(parameter.shape, device="cuda")
                module._parameters[name] = nn.Parameter(fake, requires_grad=False)
    monkeypatch.setattr(report, "backends", lambda _op, device: devices.add(device) or ["none"])
    assert {row.cls for row in explain(model)} >= {
        "Dropout",
        "T5LayerNorm",
        "T5LayerFF",
    }
    assert devices == {"cuda"}


def test_a_device_that_no_kernel_is_for(make, monkeypatch):
    model = patch(make())
    with FakeTensorMode():
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                fake = torch.empty(parameter.shape, device="xpu")
                module._parameters[name] = nn.Parameter(fake, requires_grad=False)
    assert {row.backend for row in explain(model)} <= {"reference", None}


def test_what_falls_back_says_why(make):
    model = patch(make(d_kv=24))
    model.lm_head = nn.Linear(48, 64)
    report = explain(patch(model, lm_loss=True))
    served = sum(row.reason is None for row in report)
    assert str(report).endswith(f"\n{served} of {len(report)} modules run fastprompt's kernels")
    rows = {row.cls: row.reason for row in report}
    assert "its heads are 24 wide" in rows["T5LayerSelfAttention"]
    assert "lm_head has a bias" in rows["T5ForConditionalGeneration"]
    assert rows["T5LayerFF"] is None


def test_explain_says_the_same_in_any_mode(make):
    model = patch(make(frozen=False))
    expected = explain(model)
    assert any("is trained" in (row.reason or "") for row in expected)
    with torch.no_grad():
        assert explain(model) == expected

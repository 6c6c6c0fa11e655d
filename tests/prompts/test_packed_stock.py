# SPDX-License-Identifier: Apache-2.0
"""Packed execution of a stock model's encoder: it stays as it is, and something added to it runs padded."""

import copy
import functools

import pytest
import torch
from packing import CONFIGS, LAYOUTS, ROWS, assert_same, results
from quantised import Doubled
from torch import nn
from torch.nn.modules import module as torch_module
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface
from transformers.models.t5 import modeling_t5
from transformers.models.t5.modeling_t5 import T5Attention

from fastprompt.model import PromptModel
from fastprompt.prompts import stock


@pytest.fixture
def stock_pair(make_model, monkeypatch):
    """As make_pair, over models that nobody patched. Their rows are counted without hooks, which packing avoids."""

    def make(layout="v1_1", attention="eager", **special):
        models = [make_model(layout, attention=attention, **({"d_kv": 16} | special)) for _ in range(2)]
        configs = {name: config for name, config in CONFIGS.items() if config.kind == "prepend"}
        padded, packed = (
            PromptModel(model, configs, pack=pack) for model, pack in zip(models, (False, None), strict=True)
        )
        counted, rows = packed.model.encoder.block[0].layer[-1], []
        forward = type(counted).forward

        @functools.wraps(forward)  # so that it passes for transformers' own
        def count(self, hidden, *args, **kwargs):
            if self is counted:
                rows.append(tuple(hidden.shape[:2]))
            return forward(self, hidden, *args, **kwargs)

        monkeypatch.setattr(type(counted), "forward", count)
        return padded, packed, rows

    return make


def state(encoder):
    """What its modules hold, and what the dicts among it do."""
    return {
        (name, key): list(value.items()) if isinstance(value, dict) else value
        for name, module in encoder.named_modules()
        for key, value in vars(module).items()
        if key != "_parameters"  # tensors have no truth
    }


PREPENDED = [prompts for prompts in ROWS if "p5" in prompts]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("prompts", PREPENDED, ids=str)
def test_a_stock_model_packs_and_stays_as_it_is(layout, attention, prompts, stock_pair, make_batch):
    padded, packed, rows = stock_pair(layout, attention)
    encoder, batch = packed.model.encoder, make_batch(T=6)
    before = state(encoder)
    assert_same(results(packed, batch, prompts), results(padded, batch, prompts))
    assert rows == [(ROWS[prompts], 1)]
    assert state(encoder) == before
    assert encoder.config._attn_implementation == attention


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_of_a_stock_model(reentrant, stock_pair, make_batch):
    """They compute the packed layers again in the backward pass, when the call is over."""
    padded, packed, rows = stock_pair(dropout_rate=0.0, num_layers=3)
    batch = make_batch()
    expected = results(padded.train(), batch, "p5")
    packed.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert_same(results(packed, batch, "p5"), expected)
    assert rows == [(ROWS["p5"], 1)] * 2


def test_what_transformers_and_peft_add_does_not_matter(stock_pair, make_batch):
    peft = pytest.importorskip("peft")
    padded, packed, rows = stock_pair()
    batch = make_batch()
    for prompted in (padded, packed):
        config = peft.LoraConfig(target_modules=["q", "wi_1"], init_lora_weights=False)
        torch.manual_seed(0)
        peft.inject_adapter_in_model(config, prompted.model)
        prompted.model.enable_input_require_grads()
        prompted(**batch, output_hidden_states=True)  # leaves hooks of transformers' in the model
    assert rows.pop() == (3, 12)
    assert_same(results(packed, batch, "p5"), results(padded, batch, "p5"))
    assert rows == [(ROWS["p5"], 1)]


def add(what, encoder, monkeypatch):
    """Something to the encoder that reads the mask, or may count on the shape of the rows."""
    layer = encoder.block[1].layer[0]
    attention = layer.SelfAttention
    if what == "hook":
        encoder.block[1].register_forward_hook(lambda *args: None)
    elif what == "pre-hook":
        encoder.register_forward_pre_hook(lambda *args: None)
    elif what == "backward hook":
        attention.q.register_full_backward_hook(lambda *args: None)
    elif what == "forward":
        layer.forward = layer.forward
    elif what == "method":
        attention.compute_bias = attention.compute_bias
    elif what == "patched class":
        compute = T5Attention.compute_bias
        monkeypatch.setattr(T5Attention, "compute_bias", lambda *args, **kwargs: compute(*args, **kwargs))
    elif what == "eager":
        eager = modeling_t5.eager_attention_forward
        monkeypatch.setattr(
            modeling_t5, "eager_attention_forward", lambda *args, **kwargs: eager(*args, **kwargs)
        )
    elif what == "mask":
        monkeypatch.setitem(
            AttentionMaskInterface._global_mapping, "sdpa", lambda *args, **kw: sdpa_mask(*args, **kw)
        )
        encoder.config._attn_implementation = "sdpa"
    elif what == "global hook":
        monkeypatch.setitem(torch_module._global_forward_hooks, 0, lambda *args: None)
    elif what == "activation":
        encoder.block[1].layer[1].DenseReluDense.act = nn.Softmax(-1)
    elif what == "compiled":
        monkeypatch.setattr(attention.o, "_compiled_call_impl", attention.o._call_impl)
    elif what == "class":
        attention.__class__ = type("Other", (T5Attention,), {"__module__": "elsewhere"})
    elif what == "module":
        encoder.block[1].layer[1] = type("Other", (nn.Sequential,), {"__module__": "elsewhere"})(
            encoder.block[1].layer[1]
        )
    elif what == "config":
        attention.config = copy.deepcopy(attention.config)
    elif what == "attention":
        encoder.config._attn_implementation = "of_a_user"
    elif what == "sdpa":
        monkeypatch.setitem(
            AttentionInterface._global_mapping, "sdpa", lambda *a, **k: sdpa_attention_forward(*a, **k)
        )
        encoder.config._attn_implementation = "sdpa"
    elif what == "quantised":
        attention.q.weight = nn.Parameter(Doubled(attention.q.weight.detach() / 2), requires_grad=False)
    elif what == "reference":
        monkeypatch.setattr(stock, "backends", lambda *args: ["reference"])


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("hook", "got a hook in block.1"),
        ("pre-hook", "got a hook in encoder"),
        ("backward hook", "got a hook in block.1.layer.0.SelfAttention.q"),
        ("forward", "got a forward of its own in block.1.layer.0"),
        ("method", "got a compute_bias of its own in block.1.layer.0.SelfAttention"),
        ("patched class", "got a changed T5Attention.compute_bias"),
        ("eager", "got 'eager'"),
        ("mask", "got 'sdpa'"),
        ("global hook", "needs modules without global hooks, got some"),
        ("activation", "got a Softmax in block.1.layer.1.DenseReluDense.act"),
        ("compiled", "got a compiled call in block.1.layer.0.SelfAttention.o"),
        ("class", "got a Other in block.1.layer.0.SelfAttention"),
        ("module", "got a Other in block.1.layer.1"),
        ("config", "got one of their own"),
        ("attention", "got 'of_a_user'"),
        ("sdpa", "got 'sdpa'"),
        ("quantised", "got a Doubled in block.1.layer.0.SelfAttention.q"),
        ("reference", r"needs the \w+ kernel of t5_attention on \w+, which is not installed"),
    ],
)
def test_a_stock_model_with_something_added_runs_padded(what, message, stock_pair, make_batch, monkeypatch):
    monkeypatch.setitem(AttentionInterface._global_mapping, "of_a_user", sdpa_attention_forward)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "of_a_user", sdpa_mask)
    padded, packed, rows = stock_pair()
    add(what, packed.model.encoder, monkeypatch)
    batch = make_batch()
    if what == "activation":
        add(what, padded.model.encoder, monkeypatch)
    assert_same(results(packed, batch, "p5"), results(padded, batch, "p5"))
    assert rows == [(3, 12)]
    packed.pack = True
    with pytest.raises(ValueError, match=f"pack=True .*{message}\\. "):
        packed(**batch)

# SPDX-License-Identifier: Apache-2.0
"""What t5_attention does not compute: transformers' functions run instead, with equal results."""

from contextlib import nullcontext
from functools import wraps

import pytest
import torch
from generation import generates_the_same
from layouts import LAYERS, close, step
from transformers.models.t5 import modeling_t5
from transformers.models.t5.modeling_t5 import eager_attention_forward

from fastprompt import PromptConfig, PromptModel, hf_attention, patched

pytestmark = pytest.mark.usefixtures("one_thread")


def test_trained_bias(pair, batch, labels, ran):
    """Full fine-tuning: only cross-attention, which has no bias, runs t5_attention."""
    eager, ours = pair(frozen=False)
    for our, their in zip(step(ours, batch(), labels), step(eager, batch(), labels), strict=True):
        close(our, their)
    for our, their in zip(ours.parameters(), eager.parameters(), strict=True):
        close(our.grad, their.grad, 1e-4)
    assert len(ran) == 2
    with torch.no_grad():  # evaluation in between trains nothing
        ours(**batch(), labels=labels)
    assert len(ran) == 2 + LAYERS["v1_1"]


def skewed(bias):
    return bias * torch.linspace(0.5, 1.5, bias.shape[-1], device=bias.device)


class OwnBias(modeling_t5.T5Attention):
    def compute_bias(self, *args, **how):
        return skewed(super().compute_bias(*args, **how))


class WrappedBias(modeling_t5.T5Attention):
    @wraps(modeling_t5.T5Attention.compute_bias)
    def compute_bias(self, *args, **how):
        return skewed(super().compute_bias(*args, **how))


class OwnBuckets(modeling_t5.T5Attention):
    @staticmethod
    def _relative_position_bucket(*args, **how):
        return modeling_t5.T5Attention._relative_position_bucket(*args, **how).roll(1, -1)


@pytest.mark.parametrize("place", [OwnBias, WrappedBias, OwnBuckets, "instance"])
def test_a_bias_of_ones_own_is_read_in_full(place, pair, batch, labels, ran):
    """By all layers, which are handed what the first one made: no distance alone tells it."""
    eager, ours = pair()
    for model in (eager, ours):
        first = model.encoder.block[0].layer[0].SelfAttention
        if place != "instance":
            first.__class__ = place
        else:
            make = first.compute_bias
            first.compute_bias = lambda *args, make=make, **how: skewed(make(*args, **how))
    for change in (nullcontext, patched):
        ran.clear()
        with change(ours):
            for our, their in zip(step(ours, batch(), labels), step(eager, batch(), labels), strict=True):
                close(our, their)
        assert len(ran) == (2 * len(ours.decoder.block) if change is nullcontext else 0)
    with torch.inference_mode(), pytest.raises(ValueError, match=r'own compute_bias .* Use "sdpa"'):
        ours(**batch(), labels=labels)
    with pytest.raises(ValueError, match=r"encoder's bias .* a compute_bias of its own"):
        PromptModel(ours, PromptConfig(num_tokens=2, kind="cached"))(**batch(), labels=labels)


@pytest.mark.parametrize("padding", [None, "right"])
def test_head_widths_that_no_kernel_has(padding, pair, batch, labels, ran):
    eager, ours = pair(d_kv=12)
    for our, their in zip(
        step(ours, batch(padding), labels), step(eager, batch(padding), labels), strict=True
    ):
        close(our, their)
    generates_the_same(eager, ours, batch(padding))
    generates_the_same(eager, ours, batch(padding), cache_implementation="static")
    assert not ran


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_rows_that_may_attend_to_nothing_have_gradients_of_their_own(p, pair, batch, labels, ran):
    """In transformers' functions, where sdpa's are of another size. p: the share of rows, of the second example."""
    eager, ours = pair(d_kv=12)
    inputs = batch()
    inputs["attention_mask"][1, : int(p * 17)] = 0
    decoder = torch.ones_like(labels)
    decoder[1, :2] = 0
    for our, their in zip(
        step(ours, inputs, labels, decoder_attention_mask=decoder),
        step(eager, inputs, labels, decoder_attention_mask=decoder),
        strict=True,
    ):
        close(our, their)
    assert not ran


@pytest.mark.parametrize("layout", LAYERS)
def test_attention_weights(layout, pair, batch, labels, ran):
    eager, ours = (model(**batch(), labels=labels, output_attentions=True) for model in pair(layout))
    for name in ("encoder_attentions", "decoder_attentions", "cross_attentions"):
        assert len(ours[name]) == len(eager[name]) > 0
        for our, their in zip(ours[name], eager[name], strict=True):
            close(our, their)
    assert not ran


@pytest.mark.parametrize("boolean", [False, True])
def test_a_mask_of_the_users_own(boolean, pair, batch, labels, ran):
    eager, ours = pair()
    inputs = batch()
    allowed = inputs["attention_mask"].bool()[:, None, None, :]
    additive = torch.zeros(allowed.shape, device=allowed.device).masked_fill(
        ~allowed, torch.finfo(torch.float32).min
    )
    expected = eager(**(inputs | {"attention_mask": additive}), labels=labels).logits
    mask = allowed if boolean else additive
    close(ours(**(inputs | {"attention_mask": mask}), labels=labels).logits, expected)
    if boolean:
        got = ours(**(inputs | {"attention_mask": mask}), labels=labels, output_attentions=True).logits
        close(got, expected)
        ran.clear()
    else:
        assert len(ran) == 2  # the decoder's self-attention has its mask from us


@pytest.mark.parametrize("shape", [(3, 4, 5, 7), (1, 4, 1, 7), (1, 1, 5, 7)], ids=str)
def test_a_bias_that_is_no_table_of_distances(shape, pair, device, ran):
    """Of each example, of keys alone, or of all heads: transformers adds whatever it is."""
    module = pair()[1].encoder.block[0].layer[0].SelfAttention
    q, k, v = (torch.randn(3, 4, n, 16, device=device) for n in (5, 7, 7))
    bias, everything = torch.randn(shape, device=device), hf_attention.Allowed(None, 0, causal=False)
    out, _ = hf_attention.attention(module, q, k, v, everything, scaling=1.0, position_bias=bias)
    expected, _ = eager_attention_forward(module, q, k, v, None, scaling=1.0, position_bias=bias)
    close(out, expected)
    assert not ran


def test_what_is_causal_is_for_the_mask_to_say(pair, device, ran):
    """Not for the module, of which transformers' functions ask it."""
    module = pair()[1].decoder.block[0].layer[0].SelfAttention
    q, k, v = (torch.randn(3, 4, n, 16, device=device) for n in (5, 7, 7))
    everything = hf_attention.Allowed(None, 0, causal=False)
    scaling = 1.0 + 2**-20  # of which no kernel knows
    out, _ = hf_attention.attention(module, q, k, v, everything, scaling=scaling)
    close(out, eager_attention_forward(module, q, k, v, None, scaling=scaling)[0])
    assert not ran


def test_queries_behind_more_keys_than_there_are(pair, device, ran):
    """All of them may be attended to, at the distances that the bias was made for."""
    module = pair()[1].decoder.block[0].layer[0].SelfAttention
    q, k, v = (torch.randn(3, 4, n, 16, device=device) for n in (5, 7, 7))
    distance = torch.arange(7, device=device) - torch.arange(5, device=device)[:, None]
    bias = torch.randn(4, 11, device=device)[:, distance + 4][None]
    behind = hf_attention.Allowed(None, 11, causal=True)
    out, _ = hf_attention.attention(module, q, k, v, behind, scaling=1.0, position_bias=bias)
    close(out, eager_attention_forward(module, q, k, v, None, scaling=1.0, position_bias=bias)[0])
    assert not ran


def test_another_scale(pair, batch, labels, ran):
    models = pair()
    for model in models:
        for module in model.modules():
            if hasattr(module, "scaling"):
                module.scaling = 0.5
    eager, ours = (model(**batch(), labels=labels).logits for model in models)
    close(ours, eager)
    assert not ran

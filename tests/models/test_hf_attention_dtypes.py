# SPDX-License-Identifier: Apache-2.0
"""attn_implementation="fastprompt" in narrow dtypes, in float64 and under autocast: as exact as "eager"."""

import pytest
import torch
from layouts import LAYERS, close, step
from torch import nn
from transformers.masking_utils import create_bidirectional_mask

from fastprompt import hf_attention
from fastprompt.testing import assert_within_budget

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("padding", ["right", "left"])
def test_narrow_dtypes_are_as_exact_as_eager(dtype, padding, pair, batch, ran):
    """One layer, where rounding has not been multiplied: its output and the gradient of its input."""
    eager, ours = pair(dtype=dtype)
    truth = pair(dtype=torch.float64)[0]
    truth.load_state_dict(eager.state_dict())
    hidden = torch.randn((3, 17, 48), generator=torch.Generator().manual_seed(1)).to(eager.device, dtype)
    mask = batch(padding)["attention_mask"].bool()
    results = []
    for model in (ours, eager, truth):
        layer = model.encoder.block[0].layer[0].SelfAttention
        x = hidden.detach().to(model.dtype, copy=True).requires_grad_()
        allowed = create_bidirectional_mask(model.encoder.config, x, mask)
        out = layer(x, mask=allowed)[0]
        out.backward(hidden.to(model.dtype))
        results.append((out.detach(), x.grad))
    for our, stock, exact in zip(*results, strict=True):
        assert_within_budget(our, stock, exact)
    assert len(ran) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_models(dtype, pair, batch, labels, ran):
    eager, ours = pair(dtype=dtype)
    truth = pair(dtype=torch.float64)[0]
    truth.load_state_dict(eager.state_dict())
    error = []
    for model in (ours, eager):
        logits = model(**batch(), labels=labels).logits
        assert logits.dtype == dtype
        error.append((logits.double() - truth(**batch(), labels=labels).logits).square().mean().sqrt())
    assert error[0] < 1.25 * error[1]
    assert len(ran) == LAYERS["v1_1"]


def test_float64(pair, batch, labels, ran):
    eager, ours = pair(dtype=torch.float64)
    for parameter in (*eager.parameters(), *ours.parameters()):
        parameter.data *= 1 + 1e-9  # no longer a number of float32's
    for our, their in zip(step(ours, batch(), labels), step(eager, batch(), labels), strict=True):
        close(our, their, 1e-12)
    assert len(ran) == LAYERS["v1_1"]


def test_autocast(pair, batch, labels, ran, device):
    eager, ours = pair()
    with torch.autocast(device.type, torch.bfloat16):
        close(
            ours(**batch(), labels=labels).logits.float(),
            eager(**batch(), labels=labels).logits.float(),
            0.05,
        )
    assert len(ran) == LAYERS["v1_1"]


def test_keys_of_another_dtype_are_for_autocast(pair, device, ran):
    """As a cache holds them that was filled outside of it."""
    module = pair()[1].encoder.block[0].layer[0].SelfAttention
    q, k, v = (torch.randn(3, 4, n, 16, device=device) for n in (5, 7, 7))
    everything = hf_attention.Allowed(None, 0, causal=False)
    with torch.autocast(device.type, torch.bfloat16):
        out, _ = hf_attention.attention(module, q.bfloat16(), k, v, everything, scaling=1.0)
    expected = nn.functional.scaled_dot_product_attention(*(x.bfloat16() for x in (q, k, v)), scale=1.0)
    assert torch.equal(out, expected.transpose(1, 2))
    assert not ran

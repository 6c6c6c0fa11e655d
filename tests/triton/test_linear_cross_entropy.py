# SPDX-License-Identifier: Apache-2.0
"""linear_cross_entropy's Triton kernel by itself: rows cut into many tiles, hostile labels, NaN. The op: tests/ops."""

import pytest
import torch
from fastprompt.triton_kernels import linear_cross_entropy as kernels

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FIRST, D = 1000, 37


def statistics(N, C, dtype, device):
    """Of N rows: chunk of logits, labels (in the chunk, outside, hostile), top, total, picked, others."""
    labels = FIRST + torch.randint(C, (N,))
    labels[:4] = torch.tensor([FIRST - 1, FIRST + C, -(2**62), FIRST + C - 1])
    top, total = 3 * torch.randn(N), 1 + torch.rand(N)
    top[5], total[5] = -torch.inf, 0.0
    inputs = (3 * torch.randn(N, C)).to(dtype), labels, top, total, torch.randn(N), torch.randn(N, D)
    return [x.to(device) for x in inputs]


def expected(logits, labels, top, total, picked, others):
    """The same in float64, differences rounded to fp32, with the weights that are left in the place of logits."""
    logits = logits.to(torch.float32, copy=True)
    inside = (labels >= FIRST) & (labels < FIRST + logits.shape[1])
    index = torch.where(inside, labels - FIRST, 0)[:, None]
    picked = torch.where(inside, logits.gather(1, index)[:, 0], picked)
    logits[inside] = logits[inside].scatter(1, index[inside], -torch.inf)
    now = torch.maximum(top, logits.amax(-1))
    base = now.masked_fill(now == -torch.inf, 0.0)
    weights, factor = (logits - base[:, None]).double().exp(), (top - base).double().exp()
    return weights, now, total * factor + weights.sum(-1), picked, others * factor[:, None]


@pytest.mark.parametrize("columns", [2048, 16])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("C", [1, 24, 37])
def test_a_chunk(device, monkeypatch, C, dtype, columns):
    monkeypatch.setattr(kernels, "COLUMNS", columns)
    inputs = statistics(9, C, dtype, device)
    weights, top, total, picked, others = expected(*inputs)
    for gradient in (None, inputs[5]):
        logits, labels, *statistic = (x.clone() for x in inputs[:5])
        kernels.linear_cross_entropy(logits, labels, *statistic, gradient, FIRST)
        assert torch.equal(statistic[0], top)
        torch.testing.assert_close(statistic[1].double(), total, rtol=1e-6, atol=0)
        assert torch.equal(statistic[2], picked)
    finfo = torch.finfo(dtype)
    torch.testing.assert_close(logits.double(), weights, rtol=4 * finfo.eps, atol=finfo.tiny * finfo.eps)
    torch.testing.assert_close(gradient.double(), others, rtol=1e-6, atol=0)


def test_without_a_gradient_logits_stay(device):
    inputs = statistics(6, 20, torch.float32, device)
    logits = inputs[0].clone()
    kernels.linear_cross_entropy(*inputs[:5], None, FIRST)
    assert torch.equal(inputs[0], logits)


def test_not_a_number_reaches_the_sum_and_infinities_stay_finite(device):
    inputs = statistics(8, 40, torch.float32, device)
    logits, labels, top, total, _, others = inputs
    labels[:] = FIRST - 1
    logits[0, 3], logits[1, 4], logits[2] = torch.nan, torch.inf, -torch.inf
    logits[5] = -torch.inf  # and nothing was seen before
    kernels.linear_cross_entropy(*inputs, FIRST)
    assert total[:2].isnan().all()
    assert logits[0, 3].isnan()
    assert total[2:].isfinite().all()
    assert (top[5], total[5]) == (-torch.inf, 0.0)
    assert others[2:].isfinite().all()


def test_nothing_is_launched_for_no_rows(device):
    kernels.linear_cross_entropy(*(x[:0] for x in statistics(8, 16, torch.float32, device)), FIRST)

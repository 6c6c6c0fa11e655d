# SPDX-License-Identifier: Apache-2.0
"""linear_cross_entropy's Triton kernel by itself: rows cut into many tiles, hostile labels, NaN. The op: tests/ops."""

import pytest
import torch
from fastprompt.triton_kernels import linear_cross_entropy as kernels
from loss_chunks import FIRST, D, expected, statistics

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("columns", [2048, 16])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("C", [1, 24, 37])
def test_a_chunk(device, monkeypatch, C, dtype, columns):
    monkeypatch.setattr(kernels, "COLUMNS", columns)
    inputs = statistics(9, C, dtype, device)
    weights, top, total, picked, others = expected(*inputs)
    for needs_grad, gradient in ((False, None), (True, inputs[5])):
        logits, labels, *statistic = (x.clone() for x in inputs[:5])
        kernels.linear_cross_entropy(logits, labels, *statistic, gradient, FIRST, needs_grad)
        assert torch.equal(statistic[0], top)
        torch.testing.assert_close(statistic[1].double(), total, rtol=1e-6, atol=0)
        assert torch.equal(statistic[2], picked)
    finfo = torch.finfo(dtype)
    torch.testing.assert_close(logits.double(), weights, rtol=4 * finfo.eps, atol=finfo.tiny * finfo.eps)
    torch.testing.assert_close(gradient.double(), others, rtol=1e-6, atol=0)


def test_without_a_gradient_logits_stay(device):
    inputs = statistics(6, 20, torch.float32, device)
    logits = inputs[0].clone()
    kernels.linear_cross_entropy(*inputs[:5], None, FIRST, False)
    assert torch.equal(inputs[0], logits)


def test_not_a_number_reaches_the_sum_and_infinities_stay_finite(device):
    inputs = statistics(8, 40, torch.float32, device)
    logits, labels, top, total, _, others = inputs
    labels[:] = FIRST - 1
    logits[0, 3], logits[1, 4], logits[2] = torch.nan, torch.inf, -torch.inf
    logits[5] = -torch.inf  # and nothing was seen before
    kernels.linear_cross_entropy(*inputs, FIRST, True)
    assert total[:2].isnan().all()
    assert logits[0, 3].isnan()
    assert total[2:].isfinite().all()
    assert (top[5], total[5]) == (-torch.inf, 0.0)
    assert others[2:].isfinite().all()


def test_nothing_is_launched_for_no_rows(device):
    kernels.linear_cross_entropy(*(x[:0] for x in statistics(8, 16, torch.float32, device)), FIRST, True)


@pytest.mark.parametrize("columns", [2048, 16])
def test_the_first_chunk_reads_no_statistics(device, monkeypatch, columns):
    monkeypatch.setattr(kernels, "COLUMNS", columns)
    logits, labels, *garbage = statistics(9, 24, torch.float32, device)
    nothing = (
        torch.full_like(x, value) for x, value in zip(garbage, (-torch.inf, 0.0, torch.nan, 0.0), strict=True)
    )
    weights, top, total, picked, _ = expected(logits, labels, *nothing)
    found = [torch.full_like(x, torch.nan) for x in garbage[:3]]
    found[2][:] = 5.0  # which a label that is in no chunk must not take for its logit
    kernels.linear_cross_entropy(logits, labels - FIRST, *found, None, 0, True)
    assert torch.equal(found[0], top)
    torch.testing.assert_close(found[1].double(), total, rtol=1e-6, atol=0)
    torch.testing.assert_close(found[2], picked, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(logits.double(), weights, rtol=1e-6, atol=1e-38)


@pytest.mark.parametrize("columns", [2048, 16])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("gathered", [False, True])
def test_rows(device, monkeypatch, dtype, gathered, columns):
    monkeypatch.setattr(kernels, "COLUMNS", columns)
    N, V = 7, 4
    labels = torch.tensor([0, 3, -100, 1, 2, 2**62, 1], device=device)
    top, total, picked = torch.randn(3, N, device=device)
    picked[6], picked[3], total = top[6] + 40, top[3] - 100, total.abs()
    others, weight = (
        torch.randn(N, D, device=device),
        torch.randn(N if gathered else V, D + 3, device=device).to(dtype),
    )
    losses, drows = torch.empty(N, device=device), torch.empty(N, D, device=device, dtype=dtype)
    strides = (0, D + 3) if gathered else (D + 3, 0)
    kernels.linear_cross_entropy_rows(
        labels, top, total, picked, others, weight, *strides, V, -100, losses, drows
    )
    d = top.double() - picked.double() + total.double().log()
    of_label = (weight if gathered else weight[labels.clamp(0, V - 1)]).double()[:, :D]
    truth = (others.double() / total.double().clamp_min(1.0)[:, None] - of_label) * d.sigmoid()[:, None]
    counts = labels != -100
    true_losses = torch.nn.functional.softplus(d).where(counts, 0.0)
    torch.testing.assert_close(losses.double(), true_losses, rtol=2e-6, atol=0)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(
        drows.double(), truth.where(counts[:, None], 0.0), rtol=max(eps, 1e-6), atol=2**-20
    )
    again = torch.empty_like(losses)
    kernels.linear_cross_entropy_rows(
        labels, top, total, picked, None, weight, *strides, V, -100, again, None
    )
    assert torch.equal(again, losses)


@pytest.mark.parametrize("N", [0, 1, 40, 2500])
@pytest.mark.parametrize("divided", [False, True])
def test_mean(device, N, divided):
    losses, labels = torch.rand(N, device=device), torch.arange(N, device=device) % 3
    labels[::4], losses[::4] = -100, 0.0
    loss, share = torch.empty((), device=device), torch.empty(1, device=device)
    divisor = torch.tensor(7.0, device=device) if divided else None
    kernels.linear_cross_entropy_mean(losses, labels, divisor, -100, 0.5, loss, share)
    some = int((labels != -100).sum())
    by = 7.0 if divided else max(some, 1)
    torch.testing.assert_close(loss.item(), float(losses.double().sum()) / by, rtol=1e-6, atol=0)
    torch.testing.assert_close(share.item(), 0.5 / by if some else 0.0, rtol=1e-6, atol=0)

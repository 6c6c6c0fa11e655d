# SPDX-License-Identifier: Apache-2.0
"""linear_cross_entropy: a chunk of logits goes into an online softmax over the classes other than the label.

    logits [N, C]   labels [N] int64   top, total, picked [N] fp32   others [N, D] fp32
    top' = max(top, logits)   factor = exp(top - top')
    weight = exp(logits - top')   total' = factor total + sum weight

The chunk's classes are first to first + C; before the first chunk the statistics hold nothing and are not read. A
program takes a row and goes over it twice, the second time from the L2 cache.

Behind the last chunk linear_cross_entropy_rows makes of the statistics each row's loss and gradient, and
linear_cross_entropy_mean the mean. The page fastprompt/ops/linear_cross_entropy.py has the formulas.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import launch, next_power_of_2
from ._math import exp

# Of a tile: many programs fit on a multiprocessor, so a short tile leaves enough loads in flight.
COLUMNS = 2048


@triton.jit
def _logits_tile(logits, o_row, i_c, C, BC: tl.constexpr):
    """Logits [BC] fp32 and their columns. Past the row: -infinity, which adds nothing."""
    o_c = i_c + tl.arange(0, BC)
    return tl.load(logits + o_row + o_c, mask=o_c < C, other=float("-inf")).to(tl.float32), o_c


@triton.jit(do_not_specialize=["first"])
def linear_cross_entropy_kernel(
    logits, labels, top, total, picked, others, C, first, D: tl.constexpr, NEEDS_GRAD: tl.constexpr, BC: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """others is None where earlier chunks gave nothing. Logits stay as they are unless NEEDS_GRAD."""
    i_n = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + i_n) - first
    initial = first == 0
    before = tl.load(top + i_n, mask=first > 0, other=float("-inf"))

    # 1. The largest logit so far, and the label's. A maximum may pass over NaN or not: the sum has it.
    now = before
    label_logit = 0.0
    for i_c in range(0, C, BC):
        b_logits, o_c = _logits_tile(logits, i_n * C, i_c, C, BC)
        label_logit += tl.sum(tl.where(o_c == label, b_logits, 0.0))
        now = tl.maximum(now, tl.max(tl.where(o_c == label, float("-inf"), b_logits)))
    base = tl.where(now == float("-inf"), 0.0, now)  # -infinity less itself would be NaN
    factor = exp(before - base)

    # 2. The weights and their sum.
    b_total = tl.load(total + i_n, mask=first > 0, other=0.0) * factor
    for i_c in range(0, C, BC):
        b_logits, o_c = _logits_tile(logits, i_n * C, i_c, C, BC)
        b_weight = exp(tl.where(o_c == label, float("-inf"), b_logits) - base)
        b_total += tl.sum(b_weight)
        if NEEDS_GRAD:
            tl.store(logits + i_n * C + o_c, b_weight.to(logits.dtype.element_ty), mask=o_c < C)
    tl.store(total + i_n, b_total)
    tl.store(top + i_n, now)
    inside = (label >= 0) & (label < C)
    tl.store(picked + i_n, tl.where(inside, label_logit, float("nan")), mask=inside | initial)

    # 3. What earlier chunks gave, relative to the new maximum. Most chunks do not raise it.
    if others is not None:  # noqa: SIM102, as this one is decided at compile time and the next at run time
        if factor != 1.0:
            for i_d in range(0, D, BD):
                o_d = i_d + tl.arange(0, BD)
                b_others = tl.load(others + i_n * D + o_d, mask=o_d < D, other=0.0)
                tl.store(others + i_n * D + o_d, b_others * factor, mask=o_d < D)


def linear_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    top: Tensor,
    total: Tensor,
    picked: Tensor,
    others: Tensor | None,
    first: int,
    needs_grad: bool,
) -> None:
    """logits [N, C], labels, top, total, picked [N], others [N, D] or None: all but labels are updated in place."""
    (N, C), D = logits.shape, 0 if others is None else others.shape[1]
    launch(
        linear_cross_entropy_kernel, (N,), logits.device,
        logits, labels, top, total, picked, others, C, first,
        D=D, NEEDS_GRAD=needs_grad, BC=COLUMNS, BD=min(max(next_power_of_2(D), 16), COLUMNS), num_warps=4,
    )  # fmt: skip


@triton.jit(do_not_specialize=["V", "ignore_index"])
def linear_cross_entropy_rows_kernel(
    labels, top, total, picked, others, weight, losses, drows, V, label_stride, row_stride, ignore_index,
    D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """others and drows are None where no gradient is wanted."""
    i_n = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + i_n)
    counts = label != ignore_index
    b_picked, b_total = tl.load(picked + i_n), tl.load(total + i_n)
    # An infinite logit of the label would read as certainty: it is made NaN, as in PyTorch.
    d = (tl.load(top + i_n) - tl.where(b_picked == float("inf"), float("nan"), b_picked)) + tl.log(b_total)
    grown = exp(d)
    # log(1 + x), as exact where x is small: what 1 + x rounds off is put right by the ratio.
    one_more = 1.0 + grown
    near = tl.where(one_more == 1.0, grown, tl.log(one_more) * tl.div_rn(grown, one_more - 1.0))
    loss = tl.where(d > 20.0, d, near)
    tl.store(losses + i_n, tl.where(counts, loss, 0.0))
    if drows is not None:
        odds = tl.div_rn(1.0, 1.0 + exp(-d))
        share = tl.where(b_total < 1.0, 1.0, b_total)  # below 1: there are no others
        known = tl.minimum(tl.maximum(label, 0), V - 1)
        of_label = weight + known * label_stride + i_n * row_stride
        for i_d in range(0, D, BD):
            o_d = i_d + tl.arange(0, BD)
            b_others = tl.load(others + i_n * D + o_d, mask=o_d < D, other=0.0)
            b_label = tl.load(of_label + o_d, mask=o_d < D, other=0.0).to(tl.float32)
            b_drow = (tl.div_rn(b_others, tl.zeros((BD,), tl.float32) + share) - b_label) * odds
            b_drow = tl.where(counts, b_drow, 0.0)
            tl.store(drows + i_n * D + o_d, b_drow.to(drows.dtype.element_ty), mask=o_d < D)


def linear_cross_entropy_rows(
    labels: Tensor,
    top: Tensor,
    total: Tensor,
    picked: Tensor,
    others: Tensor | None,
    weight: Tensor,
    label_stride: int,
    row_stride: int,
    V: int,
    ignore_index: int,
    losses: Tensor,
    drows: Tensor | None,
) -> None:
    """labels, top, total, picked [N], others [N, D] or None -> losses [N], drows [N, D] or None."""
    D = 0 if drows is None else drows.shape[1]
    launch(
        linear_cross_entropy_rows_kernel, (len(labels),), labels.device,
        labels, top, total, picked, others, weight, losses, drows, V, label_stride, row_stride, ignore_index,
        D=D, BD=min(max(next_power_of_2(D), 16), COLUMNS), num_warps=4,
    )  # fmt: skip


@triton.jit(do_not_specialize=["N", "ignore_index"])
def linear_cross_entropy_mean_kernel(
    losses, labels, divisor, loss, share, N, ignore_index, scale, BN: tl.constexpr
):
    """divisor is None for the number of labels that count. One program, so that the sum has one order."""
    b_sum = tl.zeros((BN,), tl.float32)
    b_count = tl.zeros((BN,), tl.float32)
    for i_n in range(0, N, BN):
        o_n = i_n + tl.arange(0, BN)
        b_sum += tl.load(losses + o_n, mask=o_n < N, other=0.0)
        b_counts = (tl.load(labels + o_n, mask=o_n < N, other=0) != ignore_index) & (o_n < N)
        b_count += b_counts.to(tl.float32)
    count = tl.sum(b_count)
    by = count
    if divisor is not None:
        by = tl.load(divisor)
    some = count > 0.0
    tl.store(loss, tl.where(some, tl.div_rn(tl.sum(b_sum), by), 0.0).to(loss.dtype.element_ty))
    tl.store(share, tl.where(some, tl.div_rn(scale + tl.zeros((), tl.float32), by), 0.0))


def linear_cross_entropy_mean(
    losses: Tensor,
    labels: Tensor,
    divisor: Tensor | None,
    ignore_index: int,
    scale: float,
    loss: Tensor,
    share: Tensor,
) -> None:
    """losses, labels [N], divisor [] fp32 or None -> loss [], share [1]."""
    launch(
        linear_cross_entropy_mean_kernel, (1,), labels.device,
        losses, labels, divisor, loss, share, len(labels), ignore_index, scale, BN=COLUMNS, num_warps=8,
    )  # fmt: skip


def aot_cases() -> Iterator[tuple[Any, ...]]:
    """Launcher calls for tests/triton_aot: long chunks, the last chunk of a vocabulary, many rows, a few."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for N, C, D in ((4096, 4096, 768), (512, 32128, 512), (4096, 3456, 1024), (64, 2048, 4096)):
            logits = torch.empty(N, C, dtype=dtype, device="meta")
            labels = logits.new_empty((N,), dtype=torch.int64)
            top, total, picked = (logits.new_empty((N,), dtype=torch.float32) for _ in range(3))
            others = logits.new_empty((N, D), dtype=torch.float32)
            for found, needs_grad in ((others, True), (None, True), (None, False)):
                yield linear_cross_entropy, logits, labels, top, total, picked, found, 4096, needs_grad
            drows, weight = logits.new_empty((N, D)), logits.new_empty((C, D))
            for found, into in ((others, drows), (None, None)):
                yield (
                    linear_cross_entropy_rows, labels, top, total, picked, found, weight, D, 0, C, -100, top, into
                )  # fmt: skip
            loss, share = logits.new_empty(()), top.new_empty((1,))
            for divisor in (None, top.new_empty(())):
                yield linear_cross_entropy_mean, top, labels, divisor, -100, 1.0, loss, share

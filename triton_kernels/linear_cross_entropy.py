# SPDX-License-Identifier: Apache-2.0
"""linear_cross_entropy: a chunk of logits goes into an online softmax over the classes other than the label.

    logits [N, C]   labels [N] int64   top, total, picked [N] fp32   others [N, D] fp32
    top' = max(top, logits)   factor = exp(top - top')
    weight = exp(logits - top')   total' = factor total + sum weight

The chunk's classes are first to first + C. A program takes a row and goes over it twice, the second time from the L2
cache. The page fastprompt/ops/linear_cross_entropy.py has the rest of the loss.
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
    logits, labels, top, total, picked, others, C, first, D: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr
):
    """others is None where no gradient is wanted; logits then stay as they are."""
    i_n = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + i_n) - first
    before = tl.load(top + i_n)

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
    b_total = tl.load(total + i_n) * factor
    for i_c in range(0, C, BC):
        b_logits, o_c = _logits_tile(logits, i_n * C, i_c, C, BC)
        b_weight = exp(tl.where(o_c == label, float("-inf"), b_logits) - base)
        b_total += tl.sum(b_weight)
        if others is not None:
            tl.store(logits + i_n * C + o_c, b_weight.to(logits.dtype.element_ty), mask=o_c < C)
    tl.store(total + i_n, b_total)
    tl.store(top + i_n, now)
    tl.store(picked + i_n, label_logit, mask=(label >= 0) & (label < C))

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
) -> None:
    """logits [N, C], labels, top, total, picked [N], others [N, D] or None: all but labels are updated in place."""
    (N, C), D = logits.shape, 0 if others is None else others.shape[1]
    launch(
        linear_cross_entropy_kernel, (N,), logits.device,
        logits, labels, top, total, picked, others, C, first,
        D=D, BC=COLUMNS, BD=min(max(next_power_of_2(D), 16), COLUMNS), num_warps=4,
    )  # fmt: skip


def aot_cases() -> Iterator[tuple[Any, ...]]:
    """Launcher calls for tests/triton_aot: long chunks, the last chunk of a vocabulary, many rows, a few."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for N, C, D in ((4096, 4096, 768), (512, 32128, 512), (4096, 3456, 1024), (64, 2048, 4096)):
            logits = torch.empty(N, C, dtype=dtype, device="meta")
            labels = logits.new_empty((N,), dtype=torch.int64)
            top, total, picked = (logits.new_empty((N,), dtype=torch.float32) for _ in range(3))
            others = logits.new_empty((N, D), dtype=torch.float32)
            yield linear_cross_entropy, logits, labels, top, total, picked, others, 4096
            yield linear_cross_entropy, logits, labels, top, total, picked, None, 4096

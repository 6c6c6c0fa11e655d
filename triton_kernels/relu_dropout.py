# SPDX-License-Identifier: Apache-2.0
"""relu_dropout: y = dropout(relu(x)), x, y [..., F], and a bit per element, kept [ceil(N / 8)] uint8."""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastprompt.ops._dropout import drop_threshold, keep_scale

from ._elements import aot_tensors, elements, kept_by_dropout, launch_elements


@triton.jit(do_not_specialize=["threshold"])
def relu_dropout_kernel(x, seed, y, kept, scale, threshold: tl.uint32, N, BD: tl.constexpr):
    """seed may be None."""
    o, m = elements(N, BD)
    b_x = tl.load(x + o, mask=m, other=0.0).to(tl.float32)
    b_pass = (b_x <= 0.0) == 0  # NaN passes, as in torch
    if seed is not None:
        b_pass = b_pass & kept_by_dropout(seed, threshold, BD)
        b_x = b_x * scale
    tl.store(y + o, tl.where(b_pass, b_x, 0.0).to(y.dtype.element_ty), mask=m)
    b_bit = tl.reshape(b_pass.to(tl.int32), (BD // 8, 8)) << tl.arange(0, 8)[None, :]
    o_byte = tl.program_id(0).to(tl.int64) * (BD // 8) + tl.arange(0, BD // 8)
    tl.store(kept + o_byte, tl.sum(b_bit, 1).to(tl.uint8), mask=o_byte * 8 < N)


@triton.jit
def relu_dropout_backward_kernel(dy, kept, dx, scale, N, BD: tl.constexpr):
    o, m = elements(N, BD)
    o_byte = tl.program_id(0).to(tl.int64) * (BD // 8) + tl.arange(0, BD // 8)
    b_byte = tl.load(kept + o_byte, mask=o_byte * 8 < N, other=0).to(tl.int32)
    b_bit = tl.reshape((b_byte[:, None] >> tl.arange(0, 8)[None, :]) & 1, (BD,))
    b_dy = tl.load(dy + o, mask=m, other=0.0).to(tl.float32)
    tl.store(dx + o, tl.where(b_bit != 0, b_dy * scale, 0.0).to(dx.dtype.element_ty), mask=m)


def relu_dropout(x: Tensor, seed: Tensor | None, dropout_p: float) -> tuple[Tensor, Tensor]:
    """x [..., F], seed [1] -> y [..., F], kept [ceil(N / 8)]."""
    y, kept = torch.empty_like(x), x.new_empty(((x.numel() + 7) // 8,), dtype=torch.uint8)
    launch_elements(
        relu_dropout_kernel, x,
        x, seed if dropout_p > 0.0 else None, y, kept, keep_scale(dropout_p), drop_threshold(dropout_p),
    )  # fmt: skip
    return y, kept


def relu_dropout_backward(dy: Tensor, kept: Tensor, dropout_p: float) -> Tensor:
    """dy [..., F], kept [ceil(N / 8)] -> dx [..., F]."""
    dx = torch.empty_like(dy)
    launch_elements(relu_dropout_backward_kernel, dy, dy, kept, dx, keep_scale(dropout_p))
    return dx


def aot_cases() -> Iterator[tuple[Any, ...]]:
    """Launcher calls for tests/triton_aot."""
    for x, seed in aot_tensors():
        yield relu_dropout, x, seed, 0.1
        yield relu_dropout, x, None, 0.0
        yield relu_dropout_backward, x, torch.empty(x.numel() // 8, dtype=torch.uint8, device="meta"), 0.1

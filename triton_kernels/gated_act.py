# SPDX-License-Identifier: Apache-2.0
"""gated_act: y = dropout(act(a) * b), a, b, y [..., F]; da = g * b * act'(a), db = g * act(a), g = dropout(dy)."""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastprompt.ops._dropout import drop_threshold, keep_scale

from ._elements import aot_tensors, elements, kept_by_dropout, launch_elements
from ._math import exp


@triton.jit
def _curve(b_x, ACT: tl.constexpr):
    """act(x) and act'(x), fp32."""
    if ACT == "gelu":
        b_cdf = 0.5 * (1.0 + tl.erf(b_x * 0.70710678))
        return b_x * b_cdf, b_cdf + b_x * (0.39894228 * exp(-0.5 * b_x * b_x))
    else:  # noqa: RET505 (Triton needs both branches of a constexpr condition spelled out)
        if ACT == "silu":
            b_v = b_x
            b_steepness = b_x * 0.0 + 1.0
        else:
            b_square = b_x * b_x
            b_v = 1.59576912 * b_x * (1.0 + 0.044715 * b_square)  # 2 sqrt(2 / pi)
            b_steepness = 1.59576912 * (1.0 + 0.134145 * b_square)
        b_e = exp(-tl.abs(b_v))
        b_near = 1.0 / (1.0 + b_e)
        b_s = tl.where(b_v < 0.0, b_e * b_near, b_near)  # sigmoid(v)
        b_bend = b_e * b_near * b_near  # s * (1 - s) without the cancellation
        # Far out the bend is zero, and infinity times zero is no number.
        return b_x * b_s, tl.where(b_bend == 0.0, b_s, b_s + b_x * b_bend * b_steepness)


@triton.jit(do_not_specialize=["threshold"])
def gated_act_kernel(a, b, seed, y, scale, threshold: tl.uint32, N, BD: tl.constexpr, ACT: tl.constexpr):
    """seed may be None."""
    o, m = elements(N, BD)
    b_y, _ = _curve(tl.load(a + o, mask=m, other=0.0).to(tl.float32), ACT)
    b_y *= tl.load(b + o, mask=m, other=0.0).to(tl.float32)
    if seed is not None:
        b_y = tl.where(kept_by_dropout(seed, threshold, BD), b_y * scale, 0.0)
    tl.store(y + o, b_y.to(y.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["threshold"])
def gated_act_backward_kernel(
    dy, a, b, seed, da, db, scale, threshold: tl.uint32, N, BD: tl.constexpr, ACT: tl.constexpr
):
    """seed may be None."""
    o, m = elements(N, BD)
    b_g = tl.load(dy + o, mask=m, other=0.0).to(tl.float32)
    if seed is not None:
        b_g = tl.where(kept_by_dropout(seed, threshold, BD), b_g * scale, 0.0)
    b_value, b_slope = _curve(tl.load(a + o, mask=m, other=0.0).to(tl.float32), ACT)
    b_da = b_g * tl.load(b + o, mask=m, other=0.0).to(tl.float32) * b_slope
    tl.store(da + o, b_da.to(da.dtype.element_ty), mask=m)
    tl.store(db + o, (b_g * b_value).to(db.dtype.element_ty), mask=m)


def gated_act(a: Tensor, b: Tensor, seed: Tensor | None, act: str, dropout_p: float) -> Tensor:
    """a, b [..., F], seed [1] -> y [..., F]."""
    y = torch.empty_like(a)
    launch_elements(
        gated_act_kernel, a,
        a, b, seed if dropout_p > 0.0 else None, y, keep_scale(dropout_p), drop_threshold(dropout_p), ACT=act,
    )  # fmt: skip
    return y


def gated_act_backward(
    dy: Tensor, a: Tensor, b: Tensor, seed: Tensor | None, act: str, dropout_p: float
) -> tuple[Tensor, Tensor]:
    """dy, a, b [..., F], seed [1] -> da, db [..., F]."""
    da, db = torch.empty_like(a), torch.empty_like(a)
    launch_elements(
        gated_act_backward_kernel, a,
        dy, a, b, seed if dropout_p > 0.0 else None, da, db, keep_scale(dropout_p), drop_threshold(dropout_p),
        ACT=act,
    )  # fmt: skip
    return da, db


def aot_cases() -> Iterator[tuple[Any, ...]]:
    """Launcher calls for tests/triton_aot."""
    for x, seed in aot_tensors():
        for act in ("gelu_new", "gelu", "silu"):
            yield gated_act, x, x, seed, act, 0.1
            yield gated_act_backward, x, x, x, seed, act, 0.1
        yield gated_act, x, x, None, "gelu_new", 0.0
        yield gated_act_backward, x, x, x, None, "gelu_new", 0.0

# SPDX-License-Identifier: Apache-2.0
"""dropout_add: h = residual + dropout(x), x, residual, h [..., D]."""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastprompt.ops._dropout import drop_threshold, keep_scale

from ._elements import aot_tensors, elements, kept_by_dropout, launch_elements


@triton.jit(do_not_specialize=["threshold"])
def dropout_add_kernel(x, residual, seed, h, scale, threshold: tl.uint32, N, BD: tl.constexpr):
    """residual and seed may be None."""
    o, m = elements(N, BD)
    b_h = tl.load(x + o, mask=m, other=0.0).to(tl.float32)
    if seed is not None:
        b_h = tl.where(kept_by_dropout(seed, threshold, BD), b_h * scale, 0.0)
    if residual is not None:
        b_h += tl.load(residual + o, mask=m, other=0.0).to(tl.float32)
    tl.store(h + o, b_h.to(h.dtype.element_ty), mask=m)


def dropout_add(x: Tensor, residual: Tensor | None, seed: Tensor | None, dropout_p: float) -> Tensor:
    """x, residual [..., D], seed [1] -> h [..., D]."""
    h = torch.empty_like(x)
    launch_elements(
        dropout_add_kernel, x,
        x, residual, seed if dropout_p > 0.0 else None, h, keep_scale(dropout_p), drop_threshold(dropout_p),
    )  # fmt: skip
    return h


def aot_cases() -> Iterator[tuple[Any, ...]]:
    """Launcher calls for tests/triton_aot."""
    for x, seed in aot_tensors():
        yield dropout_add, x, x, seed, 0.1
        yield dropout_add, x, None, seed, 0.1
        yield dropout_add, x, x, None, 0.0

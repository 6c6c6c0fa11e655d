# SPDX-License-Identifier: Apache-2.0
"""rms_norm: y = w * h * rstd with rstd = 1 / sqrt(mean(h^2) + eps), where h = x or residual + dropout(x).

    x, residual, h, y, dy, dh [N, D]   w [D]   rstd [N] fp32
    backward, with g = dy * w:   dh + rstd * (g - h * rstd^2 * mean(g * h))

One program takes BN rows. Both kernels go over a row twice, the first time for its statistics. The second pass
repeats the loads of the first: where one tile holds the whole row the compiler merges the two, and every element is
read once (tests/triton_aot asserts it); a longer row comes from the cache the second time.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastprompt.ops._dropout import drop_threshold, keep_scale

from ._launch import cdiv, launch, row_tile
from ._philox import dropout


@triton.jit
def _tile(o_n, N, i_d, D: tl.constexpr, BD: tl.constexpr):
    """Columns o_d [BD], elements o [BN, BD] and mask m [BN, BD] of the tile at rows o_n and column i_d."""
    o_d = i_d + tl.arange(0, BD)
    return o_d, o_n[:, None] * D + o_d[None, :], (o_n < N)[:, None] & (o_d < D)[None, :]


@triton.jit
def _h_tile(x, residual, seed, h, o_first, o, m, scale, threshold, D: tl.constexpr):
    """h [BN, BD] fp32, rounded to its storage dtype: the backward pass will find it so."""
    b_h = tl.load(x + o, mask=m, other=0.0).to(tl.float32)
    if seed is not None:
        b_h = dropout(b_h, tl.load(seed), o_first, scale, threshold, D)
    if residual is not None:
        b_h += tl.load(residual + o, mask=m, other=0.0).to(tl.float32)
        b_h = b_h.to(h.dtype.element_ty).to(tl.float32)
    return b_h


@triton.jit(do_not_specialize=["N", "threshold"])
def rms_norm_kernel(
    x, residual, w, seed, h, y, rstd, N, eps, scale, threshold: tl.uint32,
    D: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """residual and h are None in the plain form, seed where nothing is dropped."""
    o_n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)

    b_square = tl.zeros((BN, BD), dtype=tl.float32)
    for i_d in range(0, D, BD):
        o_d, o, m = _tile(o_n, N, i_d, D, BD)
        b_h = _h_tile(x, residual, seed, h, o_n * D + i_d, o, m, scale, threshold, D)
        b_square += b_h * b_h
    b_rstd = tl.rsqrt(tl.sum(b_square, 1) * (1.0 / D) + eps)  # [BN]

    for i_d in range(0, D, BD):
        o_d, o, m = _tile(o_n, N, i_d, D, BD)
        b_h = _h_tile(x, residual, seed, h, o_n * D + i_d, o, m, scale, threshold, D)
        b_w = tl.load(w + o_d, mask=o_d < D, other=0.0).to(tl.float32)
        b_y = b_w[None, :] * (b_h * b_rstd[:, None])
        tl.store(y + o, b_y.to(y.dtype.element_ty), mask=m)
        if residual is not None:
            tl.store(h + o, b_h.to(h.dtype.element_ty), mask=m)
    tl.store(rstd + o_n, b_rstd, mask=o_n < N)


@triton.jit
def _g_h_tile(dy, h, w, o, o_d, m, D: tl.constexpr):
    """g = dy * w and h, [BN, BD] fp32."""
    b_w = tl.load(w + o_d, mask=o_d < D, other=0.0).to(tl.float32)
    b_g = tl.load(dy + o, mask=m, other=0.0).to(tl.float32) * b_w[None, :]
    return b_g, tl.load(h + o, mask=m, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["N", "threshold"])
def rms_norm_backward_kernel(
    dy, dh, h, w, rstd, seed, dresidual, dx, N, scale, threshold: tl.uint32,
    D: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """dx is None where it would equal dresidual: in the plain form, and without dropout if the dtypes agree."""
    o_n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    b_rstd = tl.load(rstd + o_n, mask=o_n < N, other=0.0)  # [BN]

    b_gh = tl.zeros((BN, BD), dtype=tl.float32)
    for i_d in range(0, D, BD):
        o_d, o, m = _tile(o_n, N, i_d, D, BD)
        b_g, b_h = _g_h_tile(dy, h, w, o, o_d, m, D)
        b_gh += b_g * b_h
    b_pull = b_rstd * b_rstd * (tl.sum(b_gh, 1) * (1.0 / D))  # [BN]

    for i_d in range(0, D, BD):
        o_d, o, m = _tile(o_n, N, i_d, D, BD)
        b_g, b_h = _g_h_tile(dy, h, w, o, o_d, m, D)
        b_total = b_rstd[:, None] * (b_g - b_h * b_pull[:, None])
        if dh is not None:
            b_total += tl.load(dh + o, mask=m, other=0.0).to(tl.float32)
        tl.store(dresidual + o, b_total.to(dresidual.dtype.element_ty), mask=m)
        if dx is not None:
            if seed is not None:
                b_total = dropout(b_total, tl.load(seed), o_n * D + i_d, scale, threshold, D)
            tl.store(dx + o, b_total.to(dx.dtype.element_ty), mask=m)


def rms_norm(x: Tensor, w: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x [..., D], w [D] -> y [..., D] in w's dtype, rstd [N]."""
    y, rstd = torch.empty_like(x, dtype=w.dtype), _rstd(x)
    _forward(x, None, w, None, None, y, rstd, eps, 0.0)
    return y, rstd


def rms_norm_residual(
    x: Tensor, residual: Tensor, w: Tensor, seed: Tensor | None, eps: float, dropout_p: float
) -> tuple[Tensor, Tensor, Tensor]:
    """x, residual [..., D], w [D], seed [1] -> y [..., D] in w's dtype, h [..., D] in the wider, rstd [N]."""
    y, rstd = torch.empty_like(x, dtype=w.dtype), _rstd(x)
    h = torch.empty_like(x, dtype=torch.promote_types(x.dtype, residual.dtype))
    _forward(x, residual, w, seed, h, y, rstd, eps, dropout_p)
    return y, h, rstd


def rms_norm_backward(dy: Tensor, x: Tensor, w: Tensor, rstd: Tensor) -> Tensor:
    """dy, x [..., D], w [D], rstd [N] -> dx [..., D]."""
    dx = torch.empty_like(x)
    _backward(dy, None, x, w, rstd, None, dx, None, 0.0)
    return dx


def rms_norm_residual_backward(
    dy: Tensor, dh: Tensor | None, h: Tensor, w: Tensor, rstd: Tensor, seed: Tensor | None, dropout_p: float,
    dresidual: Tensor, dx: Tensor,
) -> None:  # fmt: skip
    """Fill dresidual [..., D], and dx unless it has no elements: it would equal dresidual."""
    _backward(dy, dh, h, w, rstd, seed, dresidual, dx if dx.numel() else None, dropout_p)


def _rstd(x: Tensor) -> Tensor:
    return x.new_empty((x.numel() // x.shape[-1],), dtype=torch.float32)


def _forward(
    x: Tensor, residual: Tensor | None, w: Tensor, seed: Tensor | None, h: Tensor | None, y: Tensor,
    rstd: Tensor, eps: float, dropout_p: float,
) -> None:  # fmt: skip
    N, D = rstd.numel(), x.shape[-1]
    tile = row_tile(N, D, x.device)
    launch(
        rms_norm_kernel, (cdiv(N, tile.BN),), x.device,
        x, residual, w, seed if dropout_p > 0.0 else None, h, y, rstd, N, eps,
        keep_scale(dropout_p), drop_threshold(dropout_p), D=D, **tile._asdict(),
    )  # fmt: skip


def _backward(
    dy: Tensor, dh: Tensor | None, h: Tensor, w: Tensor, rstd: Tensor, seed: Tensor | None, dresidual: Tensor,
    dx: Tensor | None, dropout_p: float,
) -> None:  # fmt: skip
    N, D = rstd.numel(), h.shape[-1]
    tile = row_tile(N, D, h.device)
    launch(
        rms_norm_backward_kernel, (cdiv(N, tile.BN),), h.device,
        dy, dh, h, w, rstd, seed if dropout_p > 0.0 else None, dresidual, dx, N,
        keep_scale(dropout_p), drop_threshold(dropout_p), D=D, **tile._asdict(),
    )  # fmt: skip


def aot_cases() -> Iterator[tuple[Any, ...]]:
    """Launcher calls for tests/triton_aot: each tile with dropout, which takes most registers; each variant."""
    meta = partial(torch.empty, device="meta")
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    tiles = [(8192, D, bf16, bf16, bf16) for D in (512, 768, 2048, 4096, 16384)]
    tiles += [(8192, 4096, fp32, fp32, fp32), (8192, 1024, fp16, fp32, fp16)]
    variants = [(8192, 1024, bf16, bf16, bf16), (8192, 1024, fp32, fp32, fp32), (32, 1024, bf16, bf16, bf16)]
    for N, D, x_dtype, h_dtype, w_dtype in tiles + variants:
        x, h, dy = meta(N, D, dtype=x_dtype), meta(N, D, dtype=h_dtype), meta(N, D, dtype=w_dtype)
        w, rstd, seed = meta(D, dtype=w_dtype), meta(N, dtype=fp32), meta(1, dtype=torch.int64)
        yield rms_norm_residual, x, h, w, seed, 1e-6, 0.1
        yield rms_norm_residual_backward, dy, h, h, w, rstd, seed, 0.1, h, x
        if (N, D, x_dtype, h_dtype, w_dtype) in variants:
            yield rms_norm_residual, x, h, w, None, 1e-6, 0.0
            yield rms_norm_residual_backward, dy, None, h, w, rstd, None, 0.0, h, x[:0]
            yield rms_norm, x, w, 1e-6
            yield rms_norm_backward, dy, x, w, rstd

# SPDX-License-Identifier: Apache-2.0
"""prompt_embed: rows [N, D] of all sequences: of each its prompt rows, then the embeddings of its tokens.

    input_ids [B, S] or packed [T]     weight [V, D]     prompts [R, D]     starts, lens [B]
    padded: out [B, L, D], N = B * L   packed: cu_tokens, cu_rows [B + 1], out [N, D]

Forward: a gather, one program per BN output rows. Backward: one program per prompt row and BD columns, which
walks over the sequences in order. starts, lens and the cu arrays may come from a GPU unchecked, so every access is
masked with the bounds of its own tensor: wrong values give zero rows.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastprompt.ops._dropout import drop_threshold, keep_scale

from ._launch import cdiv, launch, next_power_of_2, row_tile
from ._philox import dropout

BACKWARD_BD = 256  # columns of a backward program, one warp: P * D / 256 programs fill a GPU at P = 100
BACKWARD_STAGES = 8  # sequences whose gradient rows it has in flight


@triton.jit
def _sequence_of(o_n, cu_rows, B):
    """i_b [BN]: the last b in [0, B) with cu_rows[b] <= o_n, or 0; by binary search."""
    i_b = tl.zeros_like(o_n)
    size = B  # the answer lies in [i_b, i_b + size)
    while size > 1:
        half = size // 2
        i_b = tl.where(tl.load(cu_rows + i_b + half) <= o_n, i_b + half, i_b)
        size -= half
    return i_b


@triton.jit(do_not_specialize=["N", "B", "L", "S", "T", "R", "V", "threshold"])
def prompt_embed_kernel(
    input_ids, weight, prompts, starts, lens, cu_tokens, cu_rows, seed, out, error,
    N, B, L, S, T, R, V, scale, threshold: tl.uint32,
    D: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """starts and lens are None for one prompt, cu_tokens and cu_rows if padded, seed if nothing is dropped."""
    # The rows o_n of this program: row i_l of sequence i_b, whose tokens lie in [t_begin, t_end).
    i_tile = tl.program_id(0)
    if cu_rows is None:
        tiles = tl.cdiv(L, BN)
        i_l = (i_tile % tiles) * BN + tl.arange(0, BN).to(tl.int64)
        i_b = tl.zeros_like(i_l) + i_tile // tiles
        o_n, m_n = i_b * L + i_l, i_l < L
        t_begin, t_end = i_b * S, i_b * S + S
    else:
        o_n = i_tile.to(tl.int64) * BN + tl.arange(0, BN)
        m_n = o_n < N
        i_b = _sequence_of(o_n, cu_rows, B)
        i_l = o_n - tl.load(cu_rows + i_b)
        t_begin = tl.load(cu_tokens + i_b, mask=i_b < B, other=0)
        t_end = tl.load(cu_tokens + i_b + 1, mask=i_b < B, other=0)

    # Which prompt row i_r, or which token o_t, that row copies.
    i_r, b_len = i_l, tl.zeros_like(i_l) + R
    if starts is not None:
        i_r = tl.load(starts + i_b, mask=i_b < B, other=0) + i_l
        b_len = tl.load(lens + i_b, mask=i_b < B, other=0)
    o_t = t_begin + i_l - b_len
    m_prompt = m_n & (i_b < B) & (i_l >= 0) & (i_l < b_len) & (i_r >= 0) & (i_r < R)
    m_token = m_n & (i_l >= b_len) & (o_t >= t_begin) & (o_t < t_end) & (o_t >= 0) & (o_t < T)
    i_v = tl.load(input_ids + o_t, mask=m_token, other=0).to(tl.int64)
    m_known = (i_v >= 0) & (i_v < V)
    if error is not None:
        tl.store(error + tl.zeros_like(o_t), o_t + 1, mask=m_token & ~m_known)
    m_token &= m_known

    if seed is not None:
        key = tl.load(seed)  # here: inside the loop a register more spills at D = 768 on sm_90
    for i_d in range(0, D, BD):
        o_d = i_d + tl.arange(0, BD)[None, :]
        b_prompt = tl.load(prompts + i_r[:, None] * D + o_d, mask=m_prompt[:, None] & (o_d < D), other=0.0)
        b_token = tl.load(weight + i_v[:, None] * D + o_d, mask=m_token[:, None] & (o_d < D), other=0.0)
        b_out = tl.where(m_prompt[:, None], b_prompt.to(out.dtype.element_ty), b_token)
        if seed is not None:
            b_out = dropout(b_out.to(tl.float32), key, o_n * D + i_d, scale, threshold, D)
        tl.store(out + o_n[:, None] * D + o_d, b_out.to(out.dtype.element_ty), mask=m_n[:, None] & (o_d < D))


@triton.jit(do_not_specialize=["N", "B", "L", "threshold"])
def prompt_embed_backward_kernel(
    dout, starts, lens, cu_rows, seed, dprompts, N, B, L, scale, threshold: tl.uint32,
    D: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dprompts[r] = Kahan's fp32 sum, over b ascending, of the rows of dout [N, D] that copied prompt row r."""
    i_r, i_d = tl.program_id(0).to(tl.int64), tl.program_id(1) * BD
    o_d = i_d + tl.arange(0, BD)[None, :]
    b_total = tl.zeros((1, BD), dtype=tl.float32)
    b_lost = tl.zeros((1, BD), dtype=tl.float32)  # what b_total is too large by
    for i_b in tl.range(0, B, num_stages=STAGES):
        # Row i_l of sequence i_b, row o_n of all, copied prompt row i_r; m says whether there is one.
        i_l, m = i_r, True
        if starts is not None:
            i_l = i_r - tl.load(starts + i_b)
            m &= (i_l >= 0) & (i_l < tl.load(lens + i_b))
        if cu_rows is None:
            m &= i_l < L
            o_n = tl.cast(i_b, tl.int64) * L + i_l
        else:
            o_n = tl.load(cu_rows + i_b) + i_l
        m &= (o_n >= 0) & (o_n < N)

        b_row = tl.load(dout + o_n * D + o_d, mask=m & (o_d < D), other=0.0).to(tl.float32)
        if seed is not None:
            b_row = dropout(b_row, tl.load(seed), (o_n * D + i_d)[None], scale, threshold, D)
        b_row -= b_lost
        b_grown = b_total + b_row
        b_lost = tl.where(m, (b_grown - b_total) - b_row, b_lost)
        b_total = tl.where(m, b_grown, b_total)
    tl.store(dprompts + i_r * D + o_d, b_total.to(dprompts.dtype.element_ty), mask=o_d < D)


def prompt_embed(
    input_ids: Tensor, weight: Tensor, prompts: Tensor, starts: Tensor | None, lens: Tensor | None,
    cu_tokens: Tensor | None, cu_rows: Tensor | None, seed: Tensor | None, out: Tensor, error: Tensor | None,
    dropout_p: float,
) -> None:  # fmt: skip
    """Fill out [B, L, D] or [N, D].

    Args:
        input_ids: [B, S] or packed [T], int32 or int64.
        weight: [V, D], out's dtype.
        prompts: [R, D], out's dtype or float32.
        starts, lens: [B] int64; None: every sequence takes all R rows.
        cu_tokens, cu_rows: [B + 1] int64; None: padded.
        seed: [1] int64.
        error: [1] int64 in memory that the GPU can write: gets 1 + the flat index of an id outside [0, V).
    """
    (V, D), R = weight.shape, prompts.shape[0]
    if cu_rows is None:
        B, L, S = out.shape[0], out.shape[1], input_ids.shape[1]
        tile = row_tile(B * L, D, out.device)
        programs = B * cdiv(L, tile.BN)  # of one sequence each
    else:
        B, L, S = cu_rows.shape[0] - 1, 0, 0
        tile = row_tile(out.shape[0], D, out.device)
        programs = cdiv(out.shape[0], tile.BN)
    launch(
        prompt_embed_kernel, (programs,), out.device,
        input_ids, weight, prompts, starts, lens, cu_tokens, cu_rows, seed if dropout_p > 0.0 else None, out,
        error, out.shape[0], B, L, S, input_ids.numel(), R, V, keep_scale(dropout_p), drop_threshold(dropout_p),
        D=D, **tile._asdict(),
    )  # fmt: skip


def prompt_embed_backward(
    dout: Tensor, starts: Tensor | None, lens: Tensor | None, cu_rows: Tensor | None, seed: Tensor | None,
    dprompts: Tensor, B: int, rows: int, dropout_p: float,
) -> None:  # fmt: skip
    """Fill dprompts [R, D] from dout [B, L, D] with rows = L, or from packed dout [N, D] with rows = N."""
    R, D = dprompts.shape
    N, L = (B * rows, rows) if cu_rows is None else (rows, 0)
    BD = min(max(next_power_of_2(D), 16), BACKWARD_BD)
    launch(
        prompt_embed_backward_kernel, (R, cdiv(D, BD)), dout.device,
        dout, starts, lens, cu_rows, seed if dropout_p > 0.0 else None, dprompts, N, B, L,
        keep_scale(dropout_p), drop_threshold(dropout_p), D=D, BD=BD, STAGES=BACKWARD_STAGES, num_warps=1,
    )  # fmt: skip


def aot_cases() -> Iterator[tuple[Any, ...]]:
    """Launcher calls for tests/triton_aot: each tile with dropout, which takes most registers; each variant."""
    meta = partial(torch.empty, device="meta")
    bf16, fp32, int64 = torch.bfloat16, torch.float32, torch.int64
    tiles = [(16, D, bf16) for D in (512, 768, 2048, 4096, 16384)]
    variants = [(16, 1024, bf16), (16, 1024, fp32), (1, 1024, bf16)]
    for B, D, dtype in tiles + variants:
        P, S, L = 100, 512, 612
        ids, weight, prompts = meta(B, S, dtype=int64), meta(32128, D, dtype=dtype), meta(P, D, dtype=fp32)
        out, packed_ids, rows = (
            meta(B, L, D, dtype=dtype),
            meta(B * S, dtype=int64),
            meta(B * L, D, dtype=dtype),
        )
        each, cu, word = meta(B, dtype=int64), meta(B + 1, dtype=int64), meta(1, dtype=int64)
        yield prompt_embed, packed_ids, weight, prompts, each, each, cu, cu, word, rows, word, 0.1
        if (B, D, dtype) in variants:
            yield prompt_embed, ids, weight, prompts, None, None, None, None, None, out, word, 0.0
            yield prompt_embed_backward, out, None, None, None, None, prompts, B, L, 0.0
            yield prompt_embed_backward, rows, each, each, cu, word, prompts, B, B * L, 0.1

# SPDX-License-Identifier: Apache-2.0
"""The backward pass of t5_attention: a kernel for dq, and one for dk and dv of a source of keys.

    dout, out [B, T, H, K] or [Nq, H, K]   rows [3, H, N] fp32, what both want of a query (t5_attention_rows_kernel)

The other tensors, and tiles: _t5_attention_shared.py.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import architecture, cdiv, launch
from ._math import LOG2E
from ._t5_attention_shared import (
    INFINITY,
    NOT_SPECIALIZED,
    Call,
    add_product,
    aot_inputs,
    band,
    find_tile,
    first_row,
    kept,
    load,
    offset_of,
    outside,
    own_mask,
    prompt_of,
    rows_of,
    scores,
    toeplitz,
    weight,
)

INTERPRETING = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit(do_not_specialize=["N"])
def t5_attention_rows_kernel(dout, out, stats, rows, N, H: tl.constexpr, K: tl.constexpr, BM: tl.constexpr):
    """rows [3, H, N] = delta = rowsum(dout * out); shift and factor such that a weight is factor * exp(score - shift).

    In half precision the factor is 1 and shift is in units of log2: top log2(e) + log2(total). Where a row may attend
    to nothing, shift is infinite.
    """
    h = tl.program_id(1).to(tl.int64)
    o_n = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    m_n = o_n < N
    o = (o_n[:, None] * H + h) * K + tl.arange(0, K)[None, :]
    b_dout = tl.load(dout + o, mask=m_n[:, None], other=0.0).to(tl.float32)
    b_out = tl.load(out + o, mask=m_n[:, None], other=0.0).to(tl.float32)
    top = tl.load(stats + h * N + o_n, mask=m_n, other=0.0)
    total = tl.load(stats + (H + h) * N + o_n, mask=m_n, other=1.0)
    # Where top is infinite, total is NaN: shift is to be, too, as infinity has a meaning of its own.
    shift = top + 0.0 * total if dout.dtype.element_ty == tl.float32 else top * LOG2E + tl.log2(total)
    factor = tl.div_rn(tl.full((BM,), 1.0, tl.float32), tl.where(total == 0.0, 1.0, total))
    tl.store(rows + h * N + o_n, tl.sum(b_dout * b_out, 1), mask=m_n)
    starved = (total == 0.0) & (top == 0.0)  # where all scores are -infinity, top is, and weights are NaN
    tl.store(rows + (H + h) * N + o_n, tl.where(starved, INFINITY, shift), mask=m_n)
    tl.store(rows + (2 * H + h) * N + o_n, factor, mask=m_n)


@triton.jit
def _row(rows, h, H, N, o, m, EXACT: tl.constexpr):
    """delta, shift and factor of queries; a query that is not there has weights of 0."""
    o = tl.cast(h, tl.int64) * N + o
    delta = tl.load(rows + o, mask=m, other=0.0)
    shift = tl.load(rows + tl.cast(H, tl.int64) * N + o, mask=m, other=INFINITY)
    factor = tl.load(rows + tl.cast(2 * H, tl.int64) * N + o, mask=m, other=1.0) if EXACT else shift
    return delta, shift, factor


@triton.jit
def _dq_tile(
    tile, acc, b_q, b_dout, delta, shift, factor, k, v, kn, vn, key_mask, begin, keys, at, table, level, first, o_i,
    seed, j_first, pair, scale, threshold,
    BANDED: tl.constexpr, CAUSAL: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    EXACT: tl.constexpr = b_q.dtype == tl.float32
    i_n = begin + tile * BN
    o_n = i_n + tl.arange(0, BN)
    m_n = own_mask(key_mask, o_n, (o_n >= 0) & (o_n < keys))
    b_k = load(k, o_n, m_n, kn, K)
    b_s = scores(b_q, b_k, m_n, table, level, at + i_n, first, BANDED, CAUSAL, BM, BN)
    b_w = weight(b_s, shift[:, None], EXACT)
    if EXACT:
        b_w *= factor[:, None]
    b_dw = tl.dot(b_dout, tl.trans(load(v, o_n, m_n, vn, K)), input_precision="ieee")
    if seed is not None:
        b_dw = tl.where(kept(seed, o_i, j_first + i_n, pair, threshold, BM, BN), b_dw * scale, 0.0)
    b_ds = b_w * (b_dw - delta[:, None])
    return add_product(acc, 1.0, b_ds, b_k)


@triton.jit
def _attend_dq(
    acc, b_q, b_dout, delta, shift, factor, k, v, kn, vn, key_mask, begin, keys, end, at, table, M, first, o_i,
    seed, j_first, pair, scale, threshold, CAUSAL: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """acc += dscores k over keys `begin` to `end` of one source, as in _attend."""
    tiles = tl.cdiv(end - begin, BN)
    near, far, left, right = band(table, at + begin, tiles, first, BM, M, BN)
    if table is not None:
        for tile in range(near, far):
            acc = _dq_tile(
                tile, acc, b_q, b_dout, delta, shift, factor, k, v, kn, vn, key_mask, begin, keys, at, table, 0.0,
                first, o_i, seed, j_first, pair, scale, threshold, True, CAUSAL, K, BM, BN,
            )  # fmt: skip
    for i_tile in range(0, tiles - (far - near)):
        tile, level = outside(i_tile, near, far, left, right)
        acc = _dq_tile(
            tile, acc, b_q, b_dout, delta, shift, factor, k, v, kn, vn, key_mask, begin, keys, at, None,
            level, first, o_i, seed, j_first, pair, scale, threshold, False, CAUSAL, K, BM, BN,
        )  # fmt: skip
    return acc


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def t5_attention_dq_kernel(
    q, k, v, bias, prompt_k, prompt_v, prompt_ids, prompt_lens, key_mask, offsets, cu_q, cu_k, seed,
    dout, rows, dq, B, T, S, P, R, M, N, Nk, offset, scale, threshold: tl.uint32,
    qb, qn, qh, kb, kn, kh, vb, vn, vh, pkb, pkn, pkh, pvb, pvn, pvh,
    H: tl.constexpr, K: tl.constexpr, CAUSAL: tl.constexpr, PAD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(1)
    b, first, begin, count = find_tile(tl.program_id(0), cu_q, T, N, B, BM)
    if first >= count:
        return
    key_begin, keys = rows_of(b, cu_k, S, Nk)
    prompt, P_b, valid = prompt_of(b, prompt_ids, prompt_lens, R, P)
    o_i = first + tl.arange(0, BM)
    m_i = o_i < count
    query_at = offset_of(b, offsets, offset)
    table = None if bias is None else bias + h * (2 * PAD + 2 * M + 1) + PAD + M  # the entry of distance 0
    pair = b * H + h
    h64 = tl.cast(h, tl.int64)
    mask = None if key_mask is None else key_mask + tl.cast(b, tl.int64) * S

    b_q = load(q + first_row(b, begin, cu_q, qb, qn) + h64 * qh, o_i, m_i, qn, K)
    o_out = ((begin + o_i)[:, None] * H + h) * K + tl.arange(0, K)[None, :]
    b_dout = tl.load(dout + o_out, mask=m_i[:, None], other=0.0)
    delta, shift, factor = _row(rows, h, H, N, begin + o_i, m_i, b_q.dtype == tl.float32)
    acc = tl.zeros((BM, K), tl.float32)
    if prompt_k is not None:
        acc = _attend_dq(
            acc, b_q, b_dout, delta, shift, factor, prompt_k + prompt * pkb + h64 * pkh,
            prompt_v + prompt * pvb + h64 * pvh, pkn, pvn, None, 0, P_b, P_b, -P_b, table, M, first + query_at,
            o_i, seed, 0, pair, scale, threshold, False, K, BM, BN,
        )  # fmt: skip
    base_k = k + first_row(b, key_begin, cu_k, kb, kn) + h64 * kh
    base_v = v + first_row(b, key_begin, cu_k, vb, vn) + h64 * vh
    start = 0 if seed is None else -(P_b % 8)
    end = keys
    if CAUSAL:
        end = tl.minimum(keys, first + query_at + BM)
    acc = _attend_dq(
        acc, b_q, b_dout, delta, shift, factor, base_k, base_v, kn, vn, mask, start, keys, end, 0, table, M,
        first + query_at, o_i, seed, P_b, pair, scale, threshold, CAUSAL, K, BM, BN,
    )  # fmt: skip
    if mask is not None:
        starved = m_i & (shift == INFINITY)
        if tl.max(starved.to(tl.int32)) > 0:
            for i_n in range(start, keys, BN):
                o_n = i_n + tl.arange(0, BN)
                m_n = (o_n >= 0) & (o_n < keys)
                b_k = load(base_k, o_n, m_n, kn, K)
                b_dw = tl.dot(b_dout, tl.trans(load(base_v, o_n, m_n, vn, K)), input_precision="ieee")
                if seed is not None:
                    b_dw = tl.where(kept(seed, o_i, P_b + i_n, pair, threshold, BM, BN), b_dw * scale, 0.0)
                b_ds = tl.where(starved[:, None] & m_n[None, :], (b_dw - delta[:, None]) / keys, 0.0)
                acc = add_product(acc, 1.0, b_ds, b_k)
    acc = tl.where(valid, acc, float("nan"))
    tl.store(dq + o_out, acc.to(dq.dtype.element_ty), mask=m_i[:, None])


@triton.jit
def _factors(seed, o_i, j_first, pair, scale, threshold, BM: tl.constexpr, BN: tl.constexpr):
    """Dropout's factors of weights [BN, BM]; 1 without a seed. A product with 0 leaves a NaN, as in PyTorch."""
    if seed is None:
        return 1.0
    else:  # noqa: RET505, as what follows a return is compiled all the same
        return tl.where(tl.trans(kept(seed, o_i, j_first, pair, threshold, BM, BN)), scale, 0.0)


@triton.jit
def _dkv_tile(
    tile, b_dk, b_dv, hungry, b_k, b_v, q, qn, dout, rows, h, H, N, begin, queries, query_at, at, table, level, seed,
    j_first, pair, scale, threshold,
    BANDED: tl.constexpr, CAUSAL: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    EXACT: tl.constexpr = b_k.dtype == tl.float32
    o_i = tile * BM + tl.arange(0, BM)
    m_i = o_i < queries
    b_q = load(q, o_i, m_i, qn, K)
    delta, shift, factor = _row(rows, h, H, N, begin + o_i, m_i, EXACT)
    hungry |= m_i & (shift == INFINITY)
    b_s = tl.dot(b_k, tl.trans(b_q), input_precision="ieee")
    if EXACT:
        # As in scores: the weights rest on these being the forward pass's scores to the last bit.
        b_s = tl.where(m_i[None, :], b_s, 0.0)
    if BANDED:
        b_s += toeplitz(table, at - query_at - tile * BM, BN, BM, -1)
    elif EXACT:
        b_s += level
    else:
        shift -= level * LOG2E
    if CAUSAL:
        b_s = tl.where((at + tl.arange(0, BN))[:, None] <= (query_at + o_i)[None, :], b_s, -INFINITY)
    b_w = weight(b_s, shift[None, :], EXACT)
    if EXACT:
        b_w *= factor[None, :]
    b_f = _factors(seed, o_i, j_first, pair, scale, threshold, BM, BN)
    o_out = ((begin + o_i)[:, None] * H + h) * K + tl.arange(0, K)[None, :]
    b_dout = tl.load(dout + o_out, mask=m_i[:, None], other=0.0)
    b_dw = tl.dot(b_v, tl.trans(b_dout), input_precision="ieee") * b_f
    b_dv = add_product(b_dv, 1.0, b_w * b_f, b_dout)
    b_ds = b_w * (b_dw - delta[None, :])
    b_dk = add_product(b_dk, 1.0, b_ds, b_q)
    return b_dk, b_dv, hungry


@triton.jit
def _attend_dkv(
    b_dk, b_dv, hungry, b_k, b_v, q, qn, dout, rows, h, H, N, begin, queries, query_at, at, table, M, seed, j_first,
    pair, scale, threshold, CAUSAL: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """b_dk, b_dv += what all queries add for the keys at positions at, at + 1, ... Scores are [BN, BM].

    `begin`: the rows of examples before; query i is at query_at + i. hungry [BM]: was there a query that may attend
    to nothing?
    """
    tiles = tl.cdiv(queries, BM)
    start = 0
    if CAUSAL:  # queries before the keys do not see them
        start = tl.minimum(tl.maximum(at - query_at, 0) // BM, tiles)
    near, far, left, right = band(table, query_at, tiles, at, BN, M, BM)
    if CAUSAL:
        near, far = start, tl.maximum(far, start)
    if table is not None:
        for tile in range(near, far):
            b_dk, b_dv, hungry = _dkv_tile(
                tile, b_dk, b_dv, hungry, b_k, b_v, q, qn, dout, rows, h, H, N, begin, queries, query_at, at, table,
                0.0, seed, j_first, pair, scale, threshold, True, CAUSAL, K, BM, BN,
            )  # fmt: skip
    for i_tile in range(start, tiles - (far - near)):
        tile, level = outside(i_tile, near, far, right, left)
        b_dk, b_dv, hungry = _dkv_tile(
            tile, b_dk, b_dv, hungry, b_k, b_v, q, qn, dout, rows, h, H, N, begin, queries, query_at, at, None,
            level, seed, j_first, pair, scale, threshold, False, CAUSAL, K, BM, BN,
        )  # fmt: skip
    return b_dk, b_dv, hungry


@triton.jit
def _program_again(AXIS: tl.constexpr):
    """tl.program_id, read anew: the compiler takes it for another number than the one it knows."""
    if INTERPRETING:
        return tl.program_id(AXIS)
    read: tl.constexpr = "mov.u32 $0, %ctaid.y;" if AXIS else "mov.u32 $0, %ctaid.x;"
    return tl.inline_asm_elementwise(read, "=r", [], tl.int32, is_pure=False, pack=1)


@triton.jit
def _key_tile(
    i_tile, cu_k, prompt_ids, prompt_lens, B, S, P, R, Nk,
    PROMPT: tl.constexpr, MOVED: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Tile i_tile of a prompt's keys or of the example's own: example, rows before it in dk, first key and how many
    there are, the prompt, its length, whether there is such a prompt; the tile's keys, and which of them are keys."""
    if PROMPT:
        b, first, _, size = find_tile(i_tile, None, P, 0, B, BN)
        out_row = tl.cast(b, tl.int64) * P
    else:
        b, first, out_row, size = find_tile(i_tile, cu_k, S, Nk, B, BN, 7 if MOVED else 0)
    prompt, P_b, valid = prompt_of(b, prompt_ids, prompt_lens, R, P)
    if MOVED:
        first -= P_b % 8
    o_n = first + tl.arange(0, BN)
    return b, out_row, first, size, prompt, P_b, valid, o_n, (o_n >= 0) & (o_n < (P_b if PROMPT else size))


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def t5_attention_dkv_kernel(
    q, k, v, bias, prompt_ids, prompt_lens, key_mask, offsets, cu_q, cu_k, seed, dout, rows, dk, dv,
    B, T, S, P, R, M, N, Nk, offset, scale, threshold: tl.uint32, qb, qn, qh, kb, kn, kh, vb, vn, vh,
    H: tl.constexpr, K: tl.constexpr, CAUSAL: tl.constexpr, PROMPT: tl.constexpr, PAD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """With PROMPT, k and v are the prompts', and dk and dv are each example's share [B, P, H, K] of their gradients."""
    h = tl.program_id(1)
    MOVED: tl.constexpr = seed is not None and not PROMPT  # so that a tile begins a Philox block
    b, out_row, first, size, prompt, P_b, valid, o_n, real = _key_tile(
        tl.program_id(0), cu_k, prompt_ids, prompt_lens, B, S, P, R, Nk, PROMPT, MOVED, BN
    )
    if first >= size:
        return
    begin, queries = rows_of(b, cu_q, T, N)
    at = first - P_b if PROMPT else first  # position of the tile's first key
    query_at = offset_of(b, offsets, offset)
    table = None if bias is None else bias + h * (2 * PAD + 2 * M + 1) + PAD + M  # the entry of distance 0
    pair = b * H + h
    h64 = tl.cast(h, tl.int64)
    base_k = k + (prompt * kb if PROMPT else first_row(b, out_row, cu_k, kb, kn)) + h64 * kh
    base_v = v + (prompt * vb if PROMPT else first_row(b, out_row, cu_k, vb, vn)) + h64 * vh
    m_n = real if PROMPT or key_mask is None else own_mask(key_mask + tl.cast(b, tl.int64) * S, o_n, real)
    b_k, b_v = load(base_k, o_n, m_n, kn, K), load(base_v, o_n, m_n, vn, K)
    base_q = q + first_row(b, begin, cu_q, qb, qn) + h64 * qh
    j_first = first if PROMPT else P_b + first

    LATE: tl.constexpr = CAUSAL and not PROMPT  # queries before the keys do not see them
    b_dk = tl.zeros((BN, K), tl.float32)
    b_dv = tl.zeros((BN, K), tl.float32)
    hungry = tl.full((BM,), LATE, tl.int1)
    b_dk, b_dv, hungry = _attend_dkv(
        b_dk, b_dv, hungry, b_k, b_v, base_q, qn, dout, rows, h, H, N, begin, queries, query_at, at, table, M, seed,
        j_first, pair, scale, threshold, LATE, K, BM, BN,
    )  # fmt: skip
    # Once more: what nothing holds on to while the loops run is as many registers for them.
    h = _program_again(1)
    b, out_row, first, size, prompt, P_b, valid, o_n, real = _key_tile(
        _program_again(0), cu_k, prompt_ids, prompt_lens, B, S, P, R, Nk, PROMPT, MOVED, BN
    )
    m_n = real if PROMPT or key_mask is None else own_mask(key_mask + tl.cast(b, tl.int64) * S, o_n, real)
    b_dk, b_dv = tl.where(m_n[:, None], b_dk, 0.0), tl.where(m_n[:, None], b_dv, 0.0)

    if not PROMPT and key_mask is not None:  # noqa: SIM102, as this one is decided at compile time
        if tl.max(hungry.to(tl.int32)) > 0:
            b_k, b_v = load(base_k, o_n, real, kn, K), load(base_v, o_n, real, vn, K)
            for i_m in range(0, queries, BM):
                o_i = i_m + tl.arange(0, BM)
                m_i = o_i < queries
                delta, shift, _ = _row(rows, h, H, N, begin + o_i, m_i, False)
                starved = m_i & (shift == INFINITY)
                if tl.max(starved.to(tl.int32)) > 0:
                    o_out = ((begin + o_i)[:, None] * H + h) * K + tl.arange(0, K)[None, :]
                    b_dout = tl.load(dout + o_out, mask=m_i[:, None], other=0.0)
                    b_dw = tl.dot(b_v, tl.trans(b_dout), input_precision="ieee")
                    b_f = _factors(seed, o_i, j_first, pair, scale, threshold, BM, BN)
                    b_w = tl.where(starved[None, :] & real[:, None], 1.0 / size, 0.0)
                    b_q = load(base_q, o_i, m_i, qn, K)
                    b_ds = tl.where(starved[None, :], b_w * (b_dw * b_f - delta[None, :]), 0.0)
                    b_dv = add_product(b_dv, 1.0, b_w * b_f, b_dout)
                    b_dk = add_product(b_dk, 1.0, b_ds, b_q)
    b_dk, b_dv = tl.where(valid, b_dk, float("nan")), tl.where(valid, b_dv, float("nan"))
    o = ((out_row + o_n)[:, None] * H + h) * K + tl.arange(0, K)[None, :]
    m = ((o_n >= 0) & (o_n < size))[:, None]
    tl.store(dk + o, b_dk.to(dk.dtype.element_ty), mask=m)
    tl.store(dv + o, b_dv.to(dv.dtype.element_ty), mask=m)


def covers_backward(K: int, dtype: torch.dtype, device: torch.device) -> bool:
    """fp32 products of wide heads run on the ordinary units, and spill there whatever the tile."""
    return dtype != torch.float32 or K <= 64 or architecture(device).processors == 0


def t5_attention_backward(
    dout: Tensor, out: Tensor, stats: Tensor, a: Any, dq: Tensor, dk: Tensor, dv: Tensor, share_k: Tensor,
    share_v: Tensor,
) -> None:  # fmt: skip
    """Fill dq, dk, dv (contiguous) and the examples' shares [B, P, H, K] fp32 of the prompt's gradients."""
    call = Call(a)
    rows = stats.new_empty((3, *stats.shape[1:]))
    launch(
        t5_attention_rows_kernel, (cdiv(call.N, 32), call.H), a.q.device, dout, out, stats, rows, call.N,
        H=call.H, K=call.K, BM=32, num_warps=4,
    )  # fmt: skip
    tile = call.tile("dq")
    launch(
        t5_attention_dq_kernel, call.query_grid(tile), a.q.device, *call.tensors, dout, rows, dq, *call.sizes,
        *call.strides, CAUSAL=a.causal, **call.constants, **tile._asdict(), fuse=True,
    )  # fmt: skip
    q, k, v, bias, prompt_k, prompt_v, *indices = call.tensors
    tile = call.tile("dkv")
    for prompt, key, value, dkey, dvalue in (
        (False, k, v, dk, dv),
        (True, prompt_k, prompt_v, share_k, share_v),
    ):
        if key is None or not dkey.numel():
            continue
        strides = call.strides[:3] + (call.strides[9:] if prompt else call.strides[3:9])
        launch(
            t5_attention_dkv_kernel, call.key_grid(tile, prompt), a.q.device, q, key, value, bias, *indices, dout,
            rows, dkey, dvalue, *call.sizes, *strides, CAUSAL=a.causal, PROMPT=prompt, **call.constants,
            **tile._asdict(), fuse=True,
        )  # fmt: skip


def aot_cases() -> Iterator[tuple[Any, ...]]:
    """Launcher calls for tests/triton_aot."""
    for a, stats, share in aot_inputs():
        if covers_backward(a.q.shape[-1], a.q.dtype, a.q.device):
            yield t5_attention_backward, a.q, a.q, stats, a, a.q, a.k, a.k, share, share

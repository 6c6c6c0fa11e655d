# SPDX-License-Identifier: Apache-2.0
"""t5_attention: softmax(q k^T + bias[key - query] + mask) v over a prompt's keys and the example's own.

    q, out, dout [B, T, H, K] or [Nq, H, K]   k, v [B, S, H, K] or [Nk, H, K]   prompt_k, prompt_v [R, P, H, K]
    stats [2, H, N] fp32   delta [H, N] fp32 = rowsum(dout * out)   bias [H, 2M + 1] fp32

A program takes BM queries (forward, dq) or BN keys (dk, dv) of one example and head and loops over tiles of the other
side; both sources of keys go through one loop body, one after the other. Sums run in one order: no atomics. Tiles
wholly beyond the bias table's ends read one number of it. The page fastprompt/ops/t5_attention.py has the semantics.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import architecture, launch
from ._philox import drop_threshold, keep_scale


@triton.jit
def _find_tile(i_tile, cu, n, B, BLOCK: tl.constexpr):
    """Example, first row within it, rows before it and rows in it, of tile i_tile; none is left if first >= rows."""
    if cu is None:
        tiles = tl.cdiv(n, BLOCK)
        b = i_tile // tiles
        begin = b.to(tl.int64) * n
        first, count = (i_tile - b * tiles) * BLOCK, n
    else:
        b = 0
        begin = tl.load(cu)
        count = (tl.load(cu + 1) - begin).to(tl.int32)
        first = i_tile * BLOCK
        while (first >= tl.cdiv(count, BLOCK) * BLOCK) & (b < B - 1):
            first -= tl.cdiv(count, BLOCK) * BLOCK
            b += 1
            begin = tl.load(cu + b)
            count = (tl.load(cu + b + 1) - begin).to(tl.int32)
    return b, first, begin, count


@triton.jit
def _rows_of(b, cu, n):
    """Rows before example b, and rows in it."""
    if cu is None:
        begin, count = b.to(tl.int64) * n, n
    else:
        begin = tl.load(cu + b)
        count = (tl.load(cu + b + 1) - begin).to(tl.int32)
    return begin, count


@triton.jit
def _prompt_of(b, prompt_ids, prompt_lens, R, P):
    """Which prompt example b reads, how many keys of it, and whether there is such a prompt."""
    prompt = tl.full((), 0, tl.int64) if prompt_ids is None else tl.load(prompt_ids + b)
    valid = (prompt >= 0) & (prompt < R) | (P == 0)
    prompt = tl.where(valid, prompt, 0)
    keys = P if prompt_lens is None else tl.load(prompt_lens + prompt)
    keys = tl.minimum(tl.maximum(keys, 0), P).to(tl.int32)
    return prompt, tl.where(valid, keys, 0), valid


@triton.jit
def _first_row(b, begin, cu, stride_example, stride_row):
    """Where example b's rows begin, in elements."""
    return tl.cast(b, tl.int64) * stride_example if cu is None else begin * stride_row


@triton.jit
def _offset_of(b, offsets, offset):
    return offset if offsets is None else tl.load(offsets + b).to(tl.int32)


@triton.jit
def _load(base, o_row, m_row, stride, K: tl.constexpr):
    """Rows [len(o_row), K]; zeros where m_row is false."""
    return tl.load(
        base + o_row.to(tl.int64)[:, None] * stride + tl.arange(0, K)[None, :], mask=m_row[:, None], other=0.0
    )


@triton.jit
def _biased(b_s, bias, o_query, o_key, M):
    """Adds the bias of head `bias` (its table's middle) for keys at o_key [BN] and queries at o_query [BM]."""
    if bias is not None:
        nearest, farthest = tl.min(o_key) - tl.max(o_query), tl.max(o_key) - tl.min(o_query)
        if farthest <= -M:
            b_s += tl.load(bias - M)
        elif nearest >= M:
            b_s += tl.load(bias + M)
        else:
            distance = o_key[None, :] - o_query[:, None]
            b_s += tl.load(bias + tl.minimum(tl.maximum(distance, -M), M))
    return b_s


@triton.jit
def _factors(seed, o_query, j_first, pair, scale, threshold, BM: tl.constexpr, BN: tl.constexpr):
    """Dropout's factors [BM, BN] for keys j_first (a multiple of 4), j_first + 1, ... of queries o_query."""
    o_block = (j_first // 4 + tl.arange(0, BN // 4))[None, :] + tl.zeros((BM, 1), tl.int32)
    o_row = o_query[:, None] + tl.zeros((1, BN // 4), tl.int32)
    zero = tl.zeros((BM, BN // 4), tl.int32)
    word0, word1, word2, word3 = tl.philox(tl.load(seed), o_block, o_row, zero + pair, zero)
    even = tl.join(word0 >= threshold, word2 >= threshold)
    odd = tl.join(word1 >= threshold, word3 >= threshold)
    return tl.where(tl.reshape(tl.join(even, odd), (BM, BN)), scale, 0.0)


@triton.jit
def _own_mask(key_mask, b, S, o_n, m_n):
    return (
        m_n
        if key_mask is None
        else tl.load(key_mask + tl.cast(b, tl.int64) * S + o_n, mask=m_n, other=0) != 0
    )


@triton.jit
def _online(b_s, b_v, top, total, acc, b_f):
    """One step of the online softmax: scores b_s [BM, BN], values b_v [BN, K], dropout factors or None."""
    high = tl.maximum(top, tl.max(b_s, 1), propagate_nan=tl.PropagateNan.ALL)
    base = tl.where(high == float("-inf"), 0.0, high)  # no score so far: weights of 0, not NaN
    b_w = tl.exp(b_s - base[:, None])
    rescale = tl.exp(top - base)
    total = total * rescale + tl.sum(b_w, 1)
    if b_f is not None:
        b_w = tl.where(b_f != 0.0, b_w * b_f, 0.0)
    acc = acc * rescale[:, None] + tl.dot(b_w.to(b_v.dtype), b_v, input_precision="ieee")
    return high, total, acc


NOT_SPECIALIZED = ["T", "S", "P", "R", "B", "M", "N", "offset", "threshold"]


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def t5_attention_kernel(
    q, k, v, bias, prompt_k, prompt_v, prompt_ids, prompt_lens, key_mask, offsets, cu_q, cu_k, seed, out, stats,
    B, T, S, P, R, M, N, offset, scale, threshold: tl.uint32,
    qb, qn, qh, kb, kn, kh, vb, vn, vh, pkb, pkn, pkh, pvb, pvn, pvh,
    H: tl.constexpr, K: tl.constexpr, CAUSAL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(1)
    b, first, begin, count = _find_tile(tl.program_id(0), cu_q, T, B, BM)
    if first >= count:
        return
    key_begin, keys = _rows_of(b, cu_k, S)
    prompt, P_b, valid = _prompt_of(b, prompt_ids, prompt_lens, R, P)
    o_i = first + tl.arange(0, BM)
    m_i = o_i < count
    o_query = o_i + _offset_of(b, offsets, offset)
    table = None if bias is None else bias + h * (2 * M + 1) + M
    pair = b * H + h

    h64 = tl.cast(h, tl.int64)
    b_q = _load(q + _first_row(b, begin, cu_q, qb, qn) + h64 * qh, o_i, m_i, qn, K)
    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, K), tl.float32)
    seen = tl.zeros((BM,), tl.int32)

    if prompt_k is not None:
        base_k = prompt_k + prompt * pkb + h64 * pkh
        base_v = prompt_v + prompt * pvb + h64 * pvh
        for i_n in range(0, P_b, BN):
            o_n = i_n + tl.arange(0, BN)
            m_n = o_n < P_b
            b_s = tl.dot(b_q, tl.trans(_load(base_k, o_n, m_n, pkn, K)), input_precision="ieee")
            b_s = _biased(b_s, table, o_query, o_n - P_b, M)
            b_s = tl.where(m_n[None, :], b_s, float("-inf"))
            b_f = None if seed is None else _factors(seed, o_i, i_n, pair, scale, threshold, BM, BN)
            top, total, acc = _online(b_s, _load(base_v, o_n, m_n, pvn, K), top, total, acc, b_f)
            seen += 1

    base_k = k + _first_row(b, key_begin, cu_k, kb, kn) + h64 * kh
    base_v = v + _first_row(b, key_begin, cu_k, vb, vn) + h64 * vh
    start = 0 if seed is None else -(P_b % 4)  # so that a tile begins a Philox block
    end = keys
    if CAUSAL:
        end = tl.minimum(keys, tl.max(o_query) + 1)
    for i_n in range(start, end, BN):
        o_n = i_n + tl.arange(0, BN)
        m_n = _own_mask(key_mask, b, S, o_n, (o_n >= 0) & (o_n < keys))
        allowed = m_n[None, :] & (o_query[:, None] >= 0)
        if CAUSAL:
            allowed = allowed & (o_n[None, :] <= o_query[:, None])
        b_s = tl.dot(b_q, tl.trans(_load(base_k, o_n, m_n, kn, K)), input_precision="ieee")
        b_s = tl.where(allowed, _biased(b_s, table, o_query, o_n, M), float("-inf"))
        b_f = None if seed is None else _factors(seed, o_i, P_b + i_n, pair, scale, threshold, BM, BN)
        top, total, acc = _online(b_s, _load(base_v, o_n, m_n, vn, K), top, total, acc, b_f)
        seen += tl.sum(allowed.to(tl.int32), 1)

    b_out = acc / tl.where(seen > 0, total, 1.0)[:, None]
    if tl.min(seen) == 0:  # a row that may attend to nothing takes the mean of the example's own values
        mean = tl.zeros((BM, K), tl.float32)
        for i_n in range(start, keys, BN):
            o_n = i_n + tl.arange(0, BN)
            m_n = (o_n >= 0) & (o_n < keys)
            b_v = _load(base_v, o_n, m_n, vn, K)
            b_w = tl.zeros((BM, BN), tl.float32) + tl.where(m_n, 1.0, 0.0)[None, :]
            if seed is not None:
                b_w *= _factors(seed, o_i, P_b + i_n, pair, scale, threshold, BM, BN)
            mean += tl.dot(b_w.to(b_v.dtype), b_v, input_precision="ieee")
        b_out = tl.where((seen > 0)[:, None], b_out, mean / tl.maximum(keys, 1))
    b_out = tl.where(valid, b_out, float("nan"))
    rows = begin + o_i
    o_out = (rows[:, None] * H + h) * K + tl.arange(0, K)[None, :]
    tl.store(out + o_out, b_out.to(out.dtype.element_ty), mask=m_i[:, None])
    tl.store(stats + h64 * N + rows, tl.where(seen > 0, top, 0.0), mask=m_i)
    tl.store(stats + (H + h64) * N + rows, tl.where(seen > 0, total, 0.0), mask=m_i)


@triton.jit(do_not_specialize=["N"])
def t5_attention_delta_kernel(dout, out, delta, N, H: tl.constexpr, K: tl.constexpr, BM: tl.constexpr):
    """delta [H, N] = rowsum(dout * out)."""
    h = tl.program_id(1)
    o_n = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    o = (o_n[:, None] * H + h) * K + tl.arange(0, K)[None, :]
    m = (o_n < N)[:, None]
    b_dout = tl.load(dout + o, mask=m, other=0.0).to(tl.float32)
    b_out = tl.load(out + o, mask=m, other=0.0).to(tl.float32)
    tl.store(delta + h * N + o_n, tl.sum(b_dout * b_out, 1), mask=o_n < N)


@triton.jit
def _gradients(b_s, b_dweights, allowed, top, inverse, delta, b_f):
    """Weights times dropout's factors, and the gradient of the scores, [BM, BN]."""
    b_w = tl.where(allowed, tl.exp(b_s - top[:, None]) * inverse[:, None], 0.0)
    b_kept = b_w
    if b_f is not None:
        b_kept = tl.where(b_f != 0.0, b_w * b_f, 0.0)
        b_dweights = tl.where(b_f != 0.0, b_dweights * b_f, 0.0)
    return b_kept, tl.where(allowed, b_w * (b_dweights - delta[:, None]), 0.0)


@triton.jit
def _row_stats(stats, delta, rows, m_i, h, H, N, keys):
    """Of queries: top, 1 / total, delta, and whether the row may attend to nothing: then all scores are 0."""
    top = tl.load(stats + h.to(tl.int64) * N + rows, mask=m_i, other=0.0)
    total = tl.load(stats + (H + h).to(tl.int64) * N + rows, mask=m_i, other=1.0)
    starved = total == 0.0
    inverse = 1.0 / tl.where(starved, tl.maximum(keys, 1).to(tl.float32), total)
    return top, inverse, tl.load(delta + h.to(tl.int64) * N + rows, mask=m_i, other=0.0), starved


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def t5_attention_dq_kernel(
    q, k, v, bias, prompt_k, prompt_v, prompt_ids, prompt_lens, key_mask, offsets, cu_q, cu_k, seed,
    dout, stats, delta, dq, B, T, S, P, R, M, N, offset, scale, threshold: tl.uint32,
    qb, qn, qh, kb, kn, kh, vb, vn, vh, pkb, pkn, pkh, pvb, pvn, pvh,
    H: tl.constexpr, K: tl.constexpr, CAUSAL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(1)
    b, first, begin, count = _find_tile(tl.program_id(0), cu_q, T, B, BM)
    if first >= count:
        return
    key_begin, keys = _rows_of(b, cu_k, S)
    prompt, P_b, valid = _prompt_of(b, prompt_ids, prompt_lens, R, P)
    o_i = first + tl.arange(0, BM)
    m_i = o_i < count
    o_query = o_i + _offset_of(b, offsets, offset)
    table = None if bias is None else bias + h * (2 * M + 1) + M
    pair = b * H + h
    h64 = tl.cast(h, tl.int64)
    rows = begin + o_i
    b_q = _load(q + _first_row(b, begin, cu_q, qb, qn) + h64 * qh, o_i, m_i, qn, K)
    o_out = (rows[:, None] * H + h) * K + tl.arange(0, K)[None, :]
    b_dout = tl.load(dout + o_out, mask=m_i[:, None], other=0.0)
    top, inverse, b_delta, starved = _row_stats(stats, delta, rows, m_i, h, H, N, keys)
    acc = tl.zeros((BM, K), tl.float32)

    if prompt_k is not None:
        base_k = prompt_k + prompt * pkb + h64 * pkh
        base_v = prompt_v + prompt * pvb + h64 * pvh
        for i_n in range(0, P_b, BN):
            o_n = i_n + tl.arange(0, BN)
            m_n = o_n < P_b
            b_k = _load(base_k, o_n, m_n, pkn, K)
            b_s = _biased(tl.dot(b_q, tl.trans(b_k), input_precision="ieee"), table, o_query, o_n - P_b, M)
            b_dw = tl.dot(b_dout, tl.trans(_load(base_v, o_n, m_n, pvn, K)), input_precision="ieee")
            b_f = None if seed is None else _factors(seed, o_i, i_n, pair, scale, threshold, BM, BN)
            _, b_ds = _gradients(b_s, b_dw, m_n[None, :], top, inverse, b_delta, b_f)
            acc += tl.dot(b_ds.to(b_k.dtype), b_k, input_precision="ieee")

    base_k = k + _first_row(b, key_begin, cu_k, kb, kn) + h64 * kh
    base_v = v + _first_row(b, key_begin, cu_k, vb, vn) + h64 * vh
    start = 0 if seed is None else -(P_b % 4)
    hungry = tl.max(starved.to(tl.int32)) > 0
    end = keys
    if CAUSAL:
        end = tl.where(hungry, keys, tl.minimum(keys, tl.max(o_query) + 1))
    for i_n in range(start, end, BN):
        o_n = i_n + tl.arange(0, BN)
        real = (o_n >= 0) & (o_n < keys)
        m_n = _own_mask(key_mask, b, S, o_n, real)
        allowed = m_n[None, :] & (o_query[:, None] >= 0)
        if CAUSAL:
            allowed = allowed & (o_n[None, :] <= o_query[:, None])
        m_load = m_n | (real & hungry)
        b_k = _load(base_k, o_n, m_load, kn, K)
        b_s = _biased(tl.dot(b_q, tl.trans(b_k), input_precision="ieee"), table, o_query, o_n, M)
        b_s = tl.where(starved[:, None], 0.0, b_s)
        allowed = tl.where(starved[:, None], real[None, :], allowed)
        b_dw = tl.dot(b_dout, tl.trans(_load(base_v, o_n, m_load, vn, K)), input_precision="ieee")
        b_f = None if seed is None else _factors(seed, o_i, P_b + i_n, pair, scale, threshold, BM, BN)
        _, b_ds = _gradients(b_s, b_dw, allowed, top, inverse, b_delta, b_f)
        acc += tl.dot(b_ds.to(b_k.dtype), b_k, input_precision="ieee")
    acc = tl.where(valid, acc, float("nan"))
    tl.store(dq + o_out, acc.to(dq.dtype.element_ty), mask=m_i[:, None])


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def t5_attention_dkv_kernel(
    q, k, v, bias, prompt_ids, prompt_lens, key_mask, offsets, cu_q, cu_k, seed, dout, stats, delta, dk, dv,
    B, T, S, P, R, M, N, offset, scale, threshold: tl.uint32, qb, qn, qh, kb, kn, kh, vb, vn, vh,
    H: tl.constexpr, K: tl.constexpr, CAUSAL: tl.constexpr, PROMPT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """With PROMPT, k and v are the prompts', and dk and dv are each example's share [B, P, H, K] of their gradients."""
    h = tl.program_id(1)
    if PROMPT:
        b, i_n, _, size = _find_tile(tl.program_id(0), None, P, B, BN)
        out_row = tl.cast(b, tl.int64) * P
    else:
        b, i_n, out_row, size = _find_tile(tl.program_id(0), cu_k, S, B, BN)
    prompt, P_b, valid = _prompt_of(b, prompt_ids, prompt_lens, R, P)
    j_first = i_n if PROMPT else P_b + i_n
    o_n = i_n + tl.arange(0, BN)
    real = o_n < (P_b if PROMPT else size)
    begin, queries = _rows_of(b, cu_q, T)
    o_key = o_n - P_b if PROMPT else o_n
    start_at = _offset_of(b, offsets, offset)
    table = None if bias is None else bias + h * (2 * M + 1) + M
    pair = b * H + h
    h64 = tl.cast(h, tl.int64)
    base_k = k + (prompt * kb if PROMPT else _first_row(b, out_row, cu_k, kb, kn)) + h64 * kh
    base_v = v + (prompt * vb if PROMPT else _first_row(b, out_row, cu_k, vb, vn)) + h64 * vh
    b_k, b_v = _load(base_k, o_n, real, kn, K), _load(base_v, o_n, real, vn, K)
    m_n = real if PROMPT else _own_mask(key_mask, b, S, o_n, real)
    base_q = q + _first_row(b, begin, cu_q, qb, qn) + h64 * qh
    own_keys = size if not PROMPT else 1
    b_dk = tl.zeros((BN, K), tl.float32)
    b_dv = tl.zeros((BN, K), tl.float32)

    for i_m in range(0, queries, BM):
        o_i = i_m + tl.arange(0, BM)
        m_i = o_i < queries
        o_query = o_i + start_at
        rows = begin + o_i
        b_q = _load(base_q, o_i, m_i, qn, K)
        o_out = (rows[:, None] * H + h) * K + tl.arange(0, K)[None, :]
        b_dout = tl.load(dout + o_out, mask=m_i[:, None], other=0.0)
        top, inverse, b_delta, starved = _row_stats(stats, delta, rows, m_i, h, H, N, own_keys)
        allowed = m_n[None, :] & m_i[:, None]
        if CAUSAL and not PROMPT:
            allowed = allowed & (o_n[None, :] <= o_query[:, None])
        b_s = _biased(tl.dot(b_q, tl.trans(b_k), input_precision="ieee"), table, o_query, o_key, M)
        if not PROMPT:
            b_s = tl.where(starved[:, None], 0.0, b_s)
            allowed = tl.where(starved[:, None], real[None, :] & m_i[:, None], allowed)
        b_dw = tl.dot(b_dout, tl.trans(b_v), input_precision="ieee")
        b_f = None if seed is None else _any_factors(seed, o_i, j_first, pair, scale, threshold, BM, BN)
        b_w, b_ds = _gradients(b_s, b_dw, allowed, top, inverse, b_delta, b_f)
        b_dv += tl.dot(tl.trans(b_w.to(b_dout.dtype)), b_dout, input_precision="ieee")
        b_dk += tl.dot(tl.trans(b_ds.to(b_q.dtype)), b_q, input_precision="ieee")
    b_dk, b_dv = tl.where(valid, b_dk, float("nan")), tl.where(valid, b_dv, float("nan"))
    o = ((out_row + o_n)[:, None] * H + h) * K + tl.arange(0, K)[None, :]
    m = (o_n < size)[:, None]
    tl.store(dk + o, b_dk.to(dk.dtype.element_ty), mask=m)
    tl.store(dv + o, b_dv.to(dv.dtype.element_ty), mask=m)


@triton.jit
def _any_factors(seed, o_query, j_first, pair, scale, threshold, BM: tl.constexpr, BN: tl.constexpr):
    """As _factors, for a tile that may begin inside a Philox block: a block per key."""
    j = (j_first + tl.arange(0, BN))[None, :] + tl.zeros((BM, 1), tl.int32)
    o_row = o_query[:, None] + tl.zeros((1, BN), tl.int32)
    zero = tl.zeros((BM, BN), tl.int32)
    word0, word1, word2, word3 = tl.philox(tl.load(seed), j >> 2, o_row, zero + pair, zero)
    i_word = j & 3
    word = tl.where(i_word < 2, tl.where(i_word == 0, word0, word1), tl.where(i_word == 2, word2, word3))
    return tl.where(word >= threshold, scale, 0.0)


@triton.jit(do_not_specialize=["B", "E"])
def t5_attention_prompt_sum_kernel(share, prompt_ids, total, B, E, BE: tl.constexpr):
    """total [R, E] = the sum over b, ascending, of share [B, E] where example b reads prompt r."""
    r = tl.program_id(1)
    o_e = tl.program_id(0).to(tl.int64) * BE + tl.arange(0, BE)
    m_e = o_e < E
    b_sum = tl.zeros((BE,), tl.float32)
    for b in range(0, B):
        prompt = 0 if prompt_ids is None else tl.load(prompt_ids + b)
        if prompt == r:
            b_sum += tl.load(share + tl.cast(b, tl.int64) * E + o_e, mask=m_e, other=0.0)
    tl.store(total + r.to(tl.int64) * E + o_e, b_sum.to(total.dtype.element_ty), mask=m_e)


class Tile(NamedTuple):
    BM: int  # queries
    BN: int  # keys
    num_warps: int
    num_stages: int


def tile(K: int, dtype: torch.dtype, device: torch.device, backward: bool) -> Tile:
    """The largest tile that spills on no target. fp32 products run on the ordinary units and take more registers."""
    if architecture(device).processors == 0:
        return Tile(16, 16, 1, 1)  # interpreted: tests are small, and want several tiles
    if dtype == torch.float32:
        return Tile(16 if backward else 32, 32, 8 if backward else 4, 1) if K <= 64 else Tile(32, 16, 8, 1)
    if backward or K == 128:
        return Tile(32, 32, 8, 1)
    return Tile(64, 32, 8, 1) if K <= 64 else Tile(32, 16, 8, 1)


def covers_backward(K: int, dtype: torch.dtype, device: torch.device) -> bool:
    """fp32 products of wide heads run on the ordinary units, and spill there whatever the tile."""
    return dtype != torch.float32 or K <= 64 or architecture(device).processors == 0


def t5_attention(a: Any, out: Tensor, stats: Tensor) -> None:
    """Fill out (like q, contiguous) and stats [2, H, N]."""
    call = _Call(a, backward=False)
    launch(
        t5_attention_kernel, call.query_grid, a.q.device, *call.tensors, out, stats, *call.sizes, *call.strides,
        CAUSAL=a.causal, **call.constants,
    )  # fmt: skip


def t5_attention_backward(
    dout: Tensor, out: Tensor, stats: Tensor, a: Any, dq: Tensor, dk: Tensor, dv: Tensor, share_k: Tensor,
    share_v: Tensor,
) -> None:  # fmt: skip
    """Fill dq, dk, dv (contiguous) and the examples' shares [B, P, H, K] fp32 of the prompt's gradients."""
    call = _Call(a, backward=True)
    delta = torch.empty_like(stats[0])
    BM = call.constants["BM"]
    launch(
        t5_attention_delta_kernel, (triton.cdiv(call.N, BM), call.H), a.q.device, dout, out, delta, call.N,
        H=call.H, K=call.K, BM=BM, num_warps=4,
    )  # fmt: skip
    launch(
        t5_attention_dq_kernel, call.query_grid, a.q.device, *call.tensors, dout, stats, delta, dq, *call.sizes,
        *call.strides, CAUSAL=a.causal, **call.constants,
    )  # fmt: skip
    q, k, v, bias, prompt_k, prompt_v, *indices = call.tensors
    for prompt, key, value, dkey, dvalue in (
        (False, k, v, dk, dv),
        (True, prompt_k, prompt_v, share_k, share_v),
    ):
        if key is None or not dkey.numel():
            continue
        strides = call.strides[:3] + (call.strides[9:] if prompt else call.strides[3:9])
        launch(
            t5_attention_dkv_kernel, call.key_grid(prompt), a.q.device, q, key, value, bias, *indices, dout, stats,
            delta, dkey, dvalue, *call.sizes, *strides, CAUSAL=a.causal, PROMPT=prompt, **call.constants,
        )  # fmt: skip


def t5_attention_prompt_sum(share: Tensor, prompt_ids: Tensor | None, total: Tensor) -> None:
    """share [B, P, H, K] -> total [R, P, H, K], filled."""
    E = total[0].numel()
    launch(
        t5_attention_prompt_sum_kernel, (triton.cdiv(E, 1024), total.shape[0]), share.device,
        share, prompt_ids, total, share.shape[0], E, BE=1024, num_warps=4,
    )  # fmt: skip


class _Call:
    """The arguments that the kernels have in common."""

    def __init__(self, a: Any, backward: bool) -> None:
        tensors = [_unit_stride(x) for x in (a.q, a.k, a.v, a.prompt_k, a.prompt_v)]
        q, k, v, prompt_k, prompt_v = tensors
        bias = None if a.bias is None else a.bias.float().contiguous()
        indices = [None if x is None else x.contiguous() for x in a[6:12]]
        seed = a.seed if a.dropout_p > 0.0 else None
        self.tensors = (q, k, v, bias, prompt_k, prompt_v, *indices, seed)
        self.H, self.K = q.shape[-2:]
        packed = a.cu_q is not None
        B, self.T, self.S = (a.cu_q.shape[0] - 1, 0, 0) if packed else (q.shape[0], q.shape[1], k.shape[1])
        self.N, self.Nk = (q.shape[0], k.shape[0]) if packed else (B * self.T, B * self.S)
        R, self.P = (0, 0) if prompt_k is None else prompt_k.shape[:2]
        M = 0 if bias is None else bias.shape[1] // 2
        scale, threshold = keep_scale(a.dropout_p), drop_threshold(a.dropout_p)
        self.B, self.packed = B, packed
        self.sizes = (B, self.T, self.S, self.P, R, M, self.N, a.offset, scale, threshold)
        strides: list[int] = []
        for x in tensors:
            strides += (0, 0, 0) if x is None else (0, *x.stride()[:2]) if x.dim() == 3 else x.stride()[:3]
        self.strides = tuple(strides)
        self.tile = tile(self.K, q.dtype, q.device, backward)
        self.constants = {"H": self.H, "K": self.K, **self.tile._asdict()}

    @property
    def query_grid(self) -> tuple[int, int]:
        return self._tiles(self.N, self.T, self.tile.BM), self.H

    def key_grid(self, prompt: bool) -> tuple[int, int]:
        if prompt:
            return self.B * triton.cdiv(self.P, self.tile.BN), self.H
        return self._tiles(self.Nk, self.S, self.tile.BN), self.H

    def _tiles(self, rows: int, each: int, block: int) -> int:
        """Packed, no host knows the examples' lengths: at most one tile of each is not full."""
        return triton.cdiv(rows, block) + self.B if self.packed else self.B * triton.cdiv(each, block)


def _unit_stride(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def aot_cases() -> Iterator[tuple[Any, ...]]:
    """Launcher calls for tests/triton_aot: every head width and dtype, with everything on and with everything off."""
    from fastprompt.ops._t5_attention_reference import Inputs

    meta = partial(torch.empty, device="meta")
    B, T, S, H, P, R = 4, 512, 512, 12, 100, 3
    index = partial(meta, dtype=torch.int64)
    widths = [(torch.bfloat16, K) for K in (16, 32, 64, 128, 256)] + [
        (torch.float32, K) for K in (64, 128, 256)
    ]
    for dtype, K in widths:
        q, k, prompt = (meta(*shape, H, K, dtype=dtype) for shape in ((B, T), (B, S), (R, P)))
        stats, share, bias = meta(2, H, B * T), meta(B, P, H, K), meta(H, 257)
        mask = meta(B, S, dtype=torch.bool)
        full = Inputs(
            q,
            k,
            k,
            bias,
            prompt,
            prompt,
            index(B),
            index(R),
            mask,
            index(B),
            None,
            None,
            index(1),
            0,
            True,
            0.1,
        )
        plain = Inputs(q, k, k, bias, *[None] * 9, 0, False, 0.0)
        for a in (full, plain) if (dtype, K) == (torch.bfloat16, 64) else (full,):
            yield t5_attention, a, q, stats
            if covers_backward(K, dtype, q.device):
                yield t5_attention_backward, q, q, stats, a, q, k, k, share, share
    yield t5_attention_prompt_sum, meta(B, P, H, 64), index(B), meta(R, P, H, 64, dtype=torch.bfloat16)

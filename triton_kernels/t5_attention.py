# SPDX-License-Identifier: Apache-2.0
"""t5_attention: softmax(q k^T + bias[key - query] + mask) v over a prompt's keys and the example's own.

    q, out, dout [B, T, H, K] or [Nq, H, K]   k, v [B, S, H, K] or [Nk, H, K]   prompt_k, prompt_v [R, P, H, K]
    stats [2, H, N] fp32   rows [3, H, N] fp32, what the backward wants of a query (t5_attention_rows_kernel)
    bias [H, 2 PAD + 2M + 1] fp32, its ends repeated PAD times on either side

A program takes BM queries (forward, dq) or BN keys (dk, dv) of one example and head and loops over tiles of the other
side; both sources of keys go through one loop body, one after the other. Sums run in one order: no atomics.

Tiles wholly beyond the bias table's ends take one number of it, in a loop of their own; the others gather, and the
padding saves them the clamping. Scores are kept in natural units; half precision takes exp(s - top) as
exp2(s log2e - top log2e), one multiply-add per score, where float32 would lose digits. Keys that are masked are read as
zeros and their scores are -infinity.

The page fastprompt/ops/t5_attention.py has the semantics.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from fastprompt._native import contiguous, stream
from fastprompt._note import leave_note, note_on
from fastprompt._op import is_capturing
from fastprompt.ops._dropout import half_threshold

from ._launch import architecture, cdiv, generation, launch, next_power_of_2
from ._math import LOG2E, exp
from ._philox import keep_scale

PAD = 256  # at least BM + BN of every tile: how far a tile that touches the band reaches out of it
NO_KEY = tl.constexpr(2**31 - 1)
INFINITY = tl.constexpr(float("inf"))
INTERPRETING = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _rows_of(b, cu, n, N):
    """Rows before example b, and rows in it: n, or what cu says, which may be anything: of it what lies in [0, N)."""
    if cu is None:
        begin, count = tl.cast(b, tl.int64) * n, n
    else:
        begin = tl.minimum(tl.maximum(tl.load(cu + b), 0), N)
        count = (tl.minimum(tl.maximum(tl.load(cu + b + 1), begin), N) - begin).to(tl.int32)
    return begin, count


@triton.jit
def _find_tile(i_tile, cu, n, N, B, BLOCK: tl.constexpr, LEAD: tl.constexpr = 0):
    """Example, first row within it, rows before it and rows in it, of tile i_tile; none is left if first >= rows.

    LEAD: the caller may move the tiles by so many rows towards the front.
    """
    if cu is None:
        tiles = tl.cdiv(n + LEAD, BLOCK)
        b = i_tile // tiles
        first = (i_tile - b * tiles) * BLOCK
        begin, count = _rows_of(b, cu, n, N)
    else:
        b = 0
        begin, count = _rows_of(b, cu, n, N)
        first = i_tile * BLOCK
        while (first >= tl.cdiv(count + LEAD, BLOCK) * BLOCK) & (b < B - 1):
            first -= tl.cdiv(count + LEAD, BLOCK) * BLOCK
            b += 1
            begin, count = _rows_of(b, cu, n, N)
    return b, first, begin, count


@triton.jit
def _prompt_of(b, prompt_ids, prompt_lens, R, P):
    """Which prompt example b reads, how many keys of it, and whether there is such a prompt."""
    prompt = tl.full((), 0, tl.int64) if prompt_ids is None else tl.load(prompt_ids + b)
    known = (prompt >= 0) & (prompt < R)
    prompt = tl.where(known, prompt, 0)
    keys = P if prompt_lens is None else tl.load(prompt_lens + prompt, mask=known, other=0)
    keys = tl.minimum(tl.maximum(keys, 0), P).to(tl.int32)
    return prompt, tl.where(known, keys, 0), known | (P == 0)


@triton.jit
def _first_row(b, begin, cu, stride_example, stride_row):
    """Where example b's rows begin, in elements."""
    return tl.cast(b, tl.int64) * stride_example if cu is None else begin * stride_row


@triton.jit
def _offset_of(b, offsets, offset):
    return offset if offsets is None else tl.maximum(tl.load(offsets + b), 0).to(tl.int32)


@triton.jit
def _load(base, o_row, m_row, stride, K: tl.constexpr):
    """Rows [len(o_row), K]; zeros where m_row is false."""
    return tl.load(
        base + o_row.to(tl.int64)[:, None] * stride + tl.arange(0, K)[None, :], mask=m_row[:, None], other=0.0
    )


@triton.jit
def _band(table, begin, tiles, first, count, M, BLOCK: tl.constexpr):
    """Of tiles of BLOCK positions from `begin`, how many lie wholly M or more before the positions first to first +
    count - 1, and how many not wholly M or more behind them; the table's two ends. Zeros without a table."""
    near, far = 0, 0
    left, right = 0.0, 0.0
    if table is not None:
        near = tl.minimum(tl.maximum(first - M + 1 - begin, 0) // BLOCK, tiles)
        far = tl.cdiv(tl.maximum(first + count - 1 + M - begin, 0), BLOCK)
        far = tl.minimum(tl.maximum(far, near), tiles)
        left, right = tl.load(table - M), tl.load(table + M)
    return near, far, left, right


@triton.jit
def _outside(i_tile, near, far, before, behind):
    """The i-th of the tiles that are not in the band, and its bias."""
    early = i_tile < near
    return tl.where(early, i_tile, i_tile + far - near), tl.where(early, before, behind)


@triton.jit
def _keep(seed, o_query, j_first, pair, threshold: tl.uint32, BM: tl.constexpr, BN: tl.constexpr):
    """What dropout keeps of keys j_first (a multiple of 8), j_first + 1, ... of queries o_query: [BM, BN]."""
    o_block = (j_first // 8 + tl.arange(0, BN // 8))[None, :] + tl.zeros((BM, 1), tl.int32)
    o_row = o_query[:, None] + tl.zeros((1, BN // 8), tl.int32)
    zero = tl.zeros((BM, BN // 8), tl.int32)
    word0, word1, word2, word3 = tl.philox(tl.load(seed), o_block, o_row, zero + pair, zero)
    low = tl.join(
        tl.join((word0 & 0xFFFF) >= threshold, (word2 & 0xFFFF) >= threshold),
        tl.join((word1 & 0xFFFF) >= threshold, (word3 & 0xFFFF) >= threshold),
    )
    high = tl.join(
        tl.join((word0 >> 16) >= threshold, (word2 >> 16) >= threshold),
        tl.join((word1 >> 16) >= threshold, (word3 >> 16) >= threshold),
    )
    return tl.reshape(tl.join(low, high), (BM, BN))


@triton.jit
def _add_product(acc, scale, a, b):
    """acc scale + a b, where a is fp32 and multiplied in b's dtype.

    In float32 the product is a sum of its own. Triton would begin it at a plain addend: one chain through all tiles,
    each of whose roundings is as large as the whole sum's.
    """
    if b.dtype == tl.float32:
        return tl.fma(acc, scale, tl.dot(a, b, input_precision="ieee"))
    return tl.dot(a.to(b.dtype), b, acc * scale)


@triton.jit
def _own_mask(key_mask, o_n, m_n):
    return m_n if key_mask is None else tl.load(key_mask + o_n, mask=m_n, other=0) != 0


@triton.jit
def _exp(b_s, b_shift, EXACT: tl.constexpr):
    """exp(b_s - shift); unless EXACT, b_shift is shift * log2(e)."""
    return exp(b_s - b_shift) if EXACT else tl.exp2(b_s * LOG2E - b_shift)


@triton.jit
def _toeplitz(table, distance, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SIGN: tl.constexpr):
    """Bias [ROWS, COLUMNS]: of `distance` in the first corner and SIGN more per column, as many less per row.

    Offsets of 64 bits let the compiler put those between a thread's elements into the load instructions.
    """
    o = SIGN * (tl.arange(0, COLUMNS).to(tl.int64)[None, :] - tl.arange(0, ROWS).to(tl.int64)[:, None])
    return tl.load(table + distance + o)


@triton.jit
def _scores(
    b_q, b_k, m_n, table, level, at, first,
    BANDED: tl.constexpr, CAUSAL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Of queries at positions first, first + 1, ... and keys at positions at, at + 1, ...: [BM, BN], -infinity where a
    key is not allowed. `level` is the bias of all keys, unless BANDED."""
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
    if b_q.dtype == tl.float32:
        # Between the product and a plain addition: Triton would begin the product's sum at the bias, and round more.
        b_s = tl.where(m_n[None, :], b_s, -INFINITY) + level
    else:
        b_s += tl.where(m_n, level, -INFINITY)[None, :]
    if BANDED:
        b_s += _toeplitz(table, at - first, BM, BN, 1)
    if CAUSAL:
        b_s = tl.where(
            (at + tl.arange(0, BN))[None, :] <= (first + tl.arange(0, BM))[:, None], b_s, -INFINITY
        )
    return b_s


@triton.jit
def _attend_tile(
    tile, top, total, acc, first_key, b_q, k, v, kn, vn, key_mask, begin, keys, at, table, level, first, o_i, seed,
    j_first, pair, threshold,
    BANDED: tl.constexpr, CAUSAL: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A step of the online softmax."""
    EXACT: tl.constexpr = b_q.dtype == tl.float32
    i_n = begin + tile * BN
    o_n = i_n + tl.arange(0, BN)
    m_n = _own_mask(key_mask, o_n, (o_n >= 0) & (o_n < keys))
    if key_mask is not None:
        first_key = tl.minimum(first_key, tl.where(m_n, o_n, NO_KEY))
    b_k = _load(k, o_n, m_n, kn, K)
    b_s = _scores(b_q, b_k, m_n, table, level, at + i_n, first, BANDED, CAUSAL, BM, BN)
    high = tl.maximum(top, tl.max(b_s, 1), propagate_nan=tl.PropagateNan.ALL)
    shift = tl.where(high == -INFINITY, 0.0, high)  # no score so far: weights of 0, not NaN
    if not EXACT:
        shift *= LOG2E
    b_w = _exp(b_s, shift[:, None], EXACT)
    rescale = _exp(top, shift, EXACT)
    total = total * rescale + tl.sum(b_w, 1)
    if seed is not None:
        b_w = tl.where(_keep(seed, o_i, j_first + i_n, pair, threshold, BM, BN), b_w, 0.0)
    b_v = _load(v, o_n, m_n, vn, K)
    acc = _add_product(acc, rescale[:, None], b_w, b_v)
    return high, total, acc, first_key


@triton.jit
def _attend(
    top, total, acc, b_q, k, v, kn, vn, key_mask, begin, keys, end, at, table, M, first, o_i, seed, j_first, pair,
    threshold, CAUSAL: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The online softmax over keys `begin` to `end` of one source. -> also the least key that is allowed.

    Key n is at position at + n and has dropout's number j_first + n; query i of the tile is at first + i.
    """
    tiles = tl.cdiv(end - begin, BN)
    first_key = tl.full((BN,), NO_KEY, tl.int32)
    near, far, left, right = _band(table, at + begin, tiles, first, BM, M, BN)
    if table is not None:
        for tile in range(near, far):
            top, total, acc, first_key = _attend_tile(
                tile, top, total, acc, first_key, b_q, k, v, kn, vn, key_mask, begin, keys, at, table, 0.0, first, o_i,
                seed, j_first, pair, threshold, True, CAUSAL, K, BM, BN,
            )  # fmt: skip
    for i_tile in range(0, tiles - (far - near)):
        tile, level = _outside(i_tile, near, far, left, right)
        top, total, acc, first_key = _attend_tile(
            tile, top, total, acc, first_key, b_q, k, v, kn, vn, key_mask, begin, keys, at, None,
            level, first, o_i, seed, j_first, pair, threshold, False, CAUSAL, K, BM, BN,
        )  # fmt: skip
    least = tl.min(first_key) if key_mask is not None else tl.where(keys > 0, 0, NO_KEY)
    return top, total, acc, least


NOT_SPECIALIZED = ["T", "S", "P", "R", "B", "M", "N", "Nk", "offset", "threshold"]


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def t5_attention_kernel(
    q, k, v, bias, prompt_k, prompt_v, prompt_ids, prompt_lens, key_mask, offsets, cu_q, cu_k, seed, out, stats,
    B, T, S, P, R, M, N, Nk, offset, scale, threshold: tl.uint32,
    qb, qn, qh, kb, kn, kh, vb, vn, vh, pkb, pkn, pkh, pvb, pvn, pvh,
    H: tl.constexpr, K: tl.constexpr, CAUSAL: tl.constexpr, PAD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(1)
    b, first, begin, count = _find_tile(tl.program_id(0), cu_q, T, N, B, BM)
    if first >= count:
        return
    key_begin, keys = _rows_of(b, cu_k, S, Nk)
    prompt, P_b, valid = _prompt_of(b, prompt_ids, prompt_lens, R, P)
    o_i = first + tl.arange(0, BM)
    m_i = o_i < count
    query_at = _offset_of(b, offsets, offset)
    o_query = o_i + query_at
    table = None if bias is None else bias + h * (2 * PAD + 2 * M + 1) + PAD + M  # the entry of distance 0
    pair = b * H + h
    h64 = tl.cast(h, tl.int64)
    mask = None if key_mask is None else key_mask + tl.cast(b, tl.int64) * S

    b_q = _load(q + _first_row(b, begin, cu_q, qb, qn) + h64 * qh, o_i, m_i, qn, K)
    top = tl.full((BM,), -INFINITY, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, K), tl.float32)
    if prompt_k is not None:
        top, total, acc, _ = _attend(
            top, total, acc, b_q, prompt_k + prompt * pkb + h64 * pkh, prompt_v + prompt * pvb + h64 * pvh, pkn, pvn,
            None, 0, P_b, P_b, -P_b, table, M, first + query_at, o_i, seed, 0, pair, threshold, False, K, BM, BN,
        )  # fmt: skip
    base_k = k + _first_row(b, key_begin, cu_k, kb, kn) + h64 * kh
    base_v = v + _first_row(b, key_begin, cu_k, vb, vn) + h64 * vh
    start = 0 if seed is None else -(P_b % 8)  # so that a tile begins a Philox block
    end = keys
    if CAUSAL:
        end = tl.minimum(keys, first + query_at + BM)
    top, total, acc, least = _attend(
        top, total, acc, b_q, base_k, base_v, kn, vn, mask, start, keys, end, 0, table, M, first + query_at, o_i,
        seed, P_b, pair, threshold, CAUSAL, K, BM, BN,
    )  # fmt: skip

    starved = (o_query < least if CAUSAL else tl.zeros((BM,), tl.int32) + least == NO_KEY) & (P_b == 0)
    if seed is not None:
        acc *= scale
    b_out = tl.div_rn(acc, tl.where(starved, 1.0, total)[:, None] + tl.zeros((BM, K), tl.float32))
    if tl.max(starved.to(tl.int32)) > 0:  # such a row takes the mean of the example's own values
        mean = tl.zeros((BM, K), tl.float32)
        for i_n in range(start, keys, BN):
            o_n = i_n + tl.arange(0, BN)
            m_n = (o_n >= 0) & (o_n < keys)
            b_v = _load(base_v, o_n, m_n, vn, K)
            b_w = tl.zeros((BM, BN), tl.float32) + tl.where(m_n, 1.0, 0.0)[None, :]
            if seed is not None:
                b_w = tl.where(_keep(seed, o_i, P_b + i_n, pair, threshold, BM, BN), b_w * scale, 0.0)
            mean = _add_product(mean, 1.0, b_w, b_v)
        b_out = tl.where(starved[:, None], mean / tl.maximum(keys, 1), b_out)
    b_out = tl.where(valid, b_out, float("nan"))
    rows = begin + o_i
    o_out = (rows[:, None] * H + h) * K + tl.arange(0, K)[None, :]
    tl.store(out + o_out, b_out.to(out.dtype.element_ty), mask=m_i[:, None])
    tl.store(stats + h64 * N + rows, tl.where(starved, 0.0, top), mask=m_i)
    tl.store(stats + (H + h64) * N + rows, tl.where(starved, 0.0, total), mask=m_i)


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
    shift = top if dout.dtype.element_ty == tl.float32 else top * LOG2E + tl.log2(total)
    factor = tl.div_rn(tl.full((BM,), 1.0, tl.float32), tl.where(total == 0.0, 1.0, total))
    tl.store(rows + h * N + o_n, tl.sum(b_dout * b_out, 1), mask=m_n)
    tl.store(rows + (H + h) * N + o_n, tl.where(total == 0.0, INFINITY, shift), mask=m_n)
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
    m_n = _own_mask(key_mask, o_n, (o_n >= 0) & (o_n < keys))
    b_k = _load(k, o_n, m_n, kn, K)
    b_s = _scores(b_q, b_k, m_n, table, level, at + i_n, first, BANDED, CAUSAL, BM, BN)
    b_w = _exp(b_s, shift[:, None], EXACT)
    if EXACT:
        b_w *= factor[:, None]
    b_dw = tl.dot(b_dout, tl.trans(_load(v, o_n, m_n, vn, K)), input_precision="ieee")
    if seed is not None:
        b_dw = tl.where(_keep(seed, o_i, j_first + i_n, pair, threshold, BM, BN), b_dw * scale, 0.0)
    b_ds = b_w * (b_dw - delta[:, None])
    return _add_product(acc, 1.0, b_ds, b_k)


@triton.jit
def _attend_dq(
    acc, b_q, b_dout, delta, shift, factor, k, v, kn, vn, key_mask, begin, keys, end, at, table, M, first, o_i,
    seed, j_first, pair, scale, threshold, CAUSAL: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """acc += dscores k over keys `begin` to `end` of one source, as in _attend."""
    tiles = tl.cdiv(end - begin, BN)
    near, far, left, right = _band(table, at + begin, tiles, first, BM, M, BN)
    if table is not None:
        for tile in range(near, far):
            acc = _dq_tile(
                tile, acc, b_q, b_dout, delta, shift, factor, k, v, kn, vn, key_mask, begin, keys, at, table, 0.0,
                first, o_i, seed, j_first, pair, scale, threshold, True, CAUSAL, K, BM, BN,
            )  # fmt: skip
    for i_tile in range(0, tiles - (far - near)):
        tile, level = _outside(i_tile, near, far, left, right)
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
    b, first, begin, count = _find_tile(tl.program_id(0), cu_q, T, N, B, BM)
    if first >= count:
        return
    key_begin, keys = _rows_of(b, cu_k, S, Nk)
    prompt, P_b, valid = _prompt_of(b, prompt_ids, prompt_lens, R, P)
    o_i = first + tl.arange(0, BM)
    m_i = o_i < count
    query_at = _offset_of(b, offsets, offset)
    table = None if bias is None else bias + h * (2 * PAD + 2 * M + 1) + PAD + M  # the entry of distance 0
    pair = b * H + h
    h64 = tl.cast(h, tl.int64)
    mask = None if key_mask is None else key_mask + tl.cast(b, tl.int64) * S

    b_q = _load(q + _first_row(b, begin, cu_q, qb, qn) + h64 * qh, o_i, m_i, qn, K)
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
    base_k = k + _first_row(b, key_begin, cu_k, kb, kn) + h64 * kh
    base_v = v + _first_row(b, key_begin, cu_k, vb, vn) + h64 * vh
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
                b_k = _load(base_k, o_n, m_n, kn, K)
                b_dw = tl.dot(b_dout, tl.trans(_load(base_v, o_n, m_n, vn, K)), input_precision="ieee")
                if seed is not None:
                    b_dw = tl.where(_keep(seed, o_i, P_b + i_n, pair, threshold, BM, BN), b_dw * scale, 0.0)
                b_ds = tl.where(starved[:, None] & m_n[None, :], (b_dw - delta[:, None]) / keys, 0.0)
                acc = _add_product(acc, 1.0, b_ds, b_k)
    acc = tl.where(valid, acc, float("nan"))
    tl.store(dq + o_out, acc.to(dq.dtype.element_ty), mask=m_i[:, None])


@triton.jit
def _dkv_tile(
    tile, b_dk, b_dv, hungry, b_k, b_v, q, qn, dout, rows, h, H, N, begin, queries, query_at, at, table, level, seed,
    j_first, pair, scale, threshold,
    BANDED: tl.constexpr, CAUSAL: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    EXACT: tl.constexpr = b_k.dtype == tl.float32
    o_i = tile * BM + tl.arange(0, BM)
    m_i = o_i < queries
    b_q = _load(q, o_i, m_i, qn, K)
    delta, shift, factor = _row(rows, h, H, N, begin + o_i, m_i, EXACT)
    hungry |= m_i & (shift == INFINITY)
    b_s = tl.dot(b_k, tl.trans(b_q), input_precision="ieee")
    if EXACT:
        # As in _scores: the weights rest on these being the forward pass's scores to the last bit.
        b_s = tl.where(m_i[None, :], b_s, 0.0)
    if BANDED:
        b_s += _toeplitz(table, at - query_at - tile * BM, BN, BM, -1)
    elif EXACT:
        b_s += level
    else:
        shift -= level * LOG2E
    if CAUSAL:
        b_s = tl.where((at + tl.arange(0, BN))[:, None] <= (query_at + o_i)[None, :], b_s, -INFINITY)
    b_w = _exp(b_s, shift[None, :], EXACT)
    if EXACT:
        b_w *= factor[None, :]
    o_out = ((begin + o_i)[:, None] * H + h) * K + tl.arange(0, K)[None, :]
    b_dout = tl.load(dout + o_out, mask=m_i[:, None], other=0.0)
    b_dw = tl.dot(b_v, tl.trans(b_dout), input_precision="ieee")
    b_kept = b_w
    if seed is not None:
        keep = tl.trans(_keep(seed, o_i, j_first, pair, threshold, BM, BN))
        b_kept = tl.where(keep, b_w, 0.0)
        b_dw = tl.where(keep, b_dw * scale, 0.0)
    b_dv = _add_product(b_dv, 1.0, b_kept, b_dout)
    b_ds = b_w * (b_dw - delta[None, :])
    b_dk = _add_product(b_dk, 1.0, b_ds, b_q)
    return b_dk, b_dv, hungry


@triton.jit
def _attend_dkv(
    b_dk, b_dv, hungry, b_k, b_v, q, qn, dout, rows, h, H, N, begin, queries, query_at, at, table, M, seed, j_first,
    pair, scale, threshold, CAUSAL: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """b_dk, b_dv += what all queries add for the keys at positions at, at + 1, ... Scores are [BN, BM].

    `begin`: the rows of examples before; query i is at query_at + i. dv lacks dropout's scale. hungry [BM]: was there
    a query that may attend to nothing?
    """
    tiles = tl.cdiv(queries, BM)
    start = 0
    if CAUSAL:  # queries before the keys do not see them
        start = tl.minimum(tl.maximum(at - query_at, 0) // BM, tiles)
    near, far, left, right = _band(table, query_at, tiles, at, BN, M, BM)
    if CAUSAL:
        near, far = start, tl.maximum(far, start)
    if table is not None:
        for tile in range(near, far):
            b_dk, b_dv, hungry = _dkv_tile(
                tile, b_dk, b_dv, hungry, b_k, b_v, q, qn, dout, rows, h, H, N, begin, queries, query_at, at, table,
                0.0, seed, j_first, pair, scale, threshold, True, CAUSAL, K, BM, BN,
            )  # fmt: skip
    for i_tile in range(start, tiles - (far - near)):
        tile, level = _outside(i_tile, near, far, right, left)
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
        b, first, _, size = _find_tile(i_tile, None, P, 0, B, BN)
        out_row = tl.cast(b, tl.int64) * P
    else:
        b, first, out_row, size = _find_tile(i_tile, cu_k, S, Nk, B, BN, 7 if MOVED else 0)
    prompt, P_b, valid = _prompt_of(b, prompt_ids, prompt_lens, R, P)
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
    begin, queries = _rows_of(b, cu_q, T, N)
    at = first - P_b if PROMPT else first  # position of the tile's first key
    query_at = _offset_of(b, offsets, offset)
    table = None if bias is None else bias + h * (2 * PAD + 2 * M + 1) + PAD + M  # the entry of distance 0
    pair = b * H + h
    h64 = tl.cast(h, tl.int64)
    base_k = k + (prompt * kb if PROMPT else _first_row(b, out_row, cu_k, kb, kn)) + h64 * kh
    base_v = v + (prompt * vb if PROMPT else _first_row(b, out_row, cu_k, vb, vn)) + h64 * vh
    m_n = real if PROMPT or key_mask is None else _own_mask(key_mask + tl.cast(b, tl.int64) * S, o_n, real)
    b_k, b_v = _load(base_k, o_n, m_n, kn, K), _load(base_v, o_n, m_n, vn, K)
    base_q = q + _first_row(b, begin, cu_q, qb, qn) + h64 * qh
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
    m_n = real if PROMPT or key_mask is None else _own_mask(key_mask + tl.cast(b, tl.int64) * S, o_n, real)
    if seed is not None:
        b_dv *= scale
    b_dk, b_dv = tl.where(m_n[:, None], b_dk, 0.0), tl.where(m_n[:, None], b_dv, 0.0)

    if not PROMPT and key_mask is not None:  # noqa: SIM102, as this one is decided at compile time
        if tl.max(hungry.to(tl.int32)) > 0:
            b_k, b_v = _load(base_k, o_n, real, kn, K), _load(base_v, o_n, real, vn, K)
            for i_m in range(0, queries, BM):
                o_i = i_m + tl.arange(0, BM)
                m_i = o_i < queries
                delta, shift, _ = _row(rows, h, H, N, begin + o_i, m_i, False)
                starved = m_i & (shift == INFINITY)
                if tl.max(starved.to(tl.int32)) > 0:
                    o_out = ((begin + o_i)[:, None] * H + h) * K + tl.arange(0, K)[None, :]
                    b_dout = tl.load(dout + o_out, mask=m_i[:, None], other=0.0)
                    b_dw = tl.dot(b_v, tl.trans(b_dout), input_precision="ieee")
                    b_w = tl.where(starved[None, :] & real[:, None], 1.0 / size, 0.0)
                    b_kept = b_w
                    if seed is not None:
                        keep = tl.trans(_keep(seed, o_i, j_first, pair, threshold, BM, BN))
                        b_kept = tl.where(keep, b_w * scale, 0.0)
                        b_dw = tl.where(keep, b_dw * scale, 0.0)
                    b_q = _load(base_q, o_i, m_i, qn, K)
                    b_ds = tl.where(starved[None, :], b_w * (b_dw - delta[None, :]), 0.0)
                    b_dv = _add_product(b_dv, 1.0, b_kept, b_dout)
                    b_dk = _add_product(b_dk, 1.0, b_ds, b_q)
    b_dk, b_dv = tl.where(valid, b_dk, float("nan")), tl.where(valid, b_dv, float("nan"))
    o = ((out_row + o_n)[:, None] * H + h) * K + tl.arange(0, K)[None, :]
    m = ((o_n >= 0) & (o_n < size))[:, None]
    tl.store(dk + o, b_dk.to(dk.dtype.element_ty), mask=m)
    tl.store(dv + o, b_dv.to(dv.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["B", "E"])
def t5_attention_prompt_sum_kernel(share, prompt_ids, total, B, E, BE: tl.constexpr):
    """total [R, E] = the sum over b, ascending, of share [B, E] where example b reads prompt r."""
    tiles = tl.cdiv(E, BE)
    r = tl.program_id(0) // tiles
    o_e = (tl.program_id(0) - r * tiles).to(tl.int64) * BE + tl.arange(0, BE)
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


INTERPRETED = Tile(16, 16, 1, 1)  # tests are small, and want several tiles

# Half precision: pass -> K -> a tile that spills nowhere; for Hopper the fastest such one found there.
HOPPER = {
    "forward": {64: Tile(128, 32, 8, 3), 128: Tile(128, 64, 8, 3), 256: Tile(32, 16, 8, 1)},
    "dq": {64: Tile(128, 32, 8, 2), 128: Tile(128, 64, 8, 3), 256: Tile(32, 16, 8, 1)},
    "dkv": {64: Tile(32, 64, 4, 1), 128: Tile(32, 64, 4, 1), 256: Tile(16, 16, 8, 1)},
}
HOPPER_BUSY = {  # with dropout, a causal mask or, for dq from K = 128 on, any mask: they take registers
    "forward": {64: Tile(64, 32, 4, 3), 128: Tile(128, 64, 8, 3), 256: Tile(32, 16, 8, 1)},
    "dq": {64: Tile(64, 32, 4, 2), 128: Tile(128, 32, 8, 2), 256: Tile(16, 16, 8, 1)},
    "dkv": {64: Tile(32, 64, 4, 1), 128: Tile(16, 64, 4, 1), 256: Tile(16, 16, 8, 1)},
}
OTHERS = {  # not measured
    "forward": {64: Tile(64, 32, 8, 1), 128: Tile(64, 32, 8, 1), 256: Tile(32, 16, 8, 1)},
    "dq": {64: Tile(32, 32, 8, 1), 128: Tile(64, 32, 8, 1), 256: Tile(32, 16, 8, 1)},
    "dkv": {64: Tile(32, 32, 8, 1), 128: Tile(32, 32, 8, 1), 256: Tile(16, 16, 8, 1)},
}
OTHERS_BUSY = OTHERS | {"dq": OTHERS["dq"] | {128: Tile(32, 32, 8, 1), 256: Tile(16, 16, 8, 1)}}
# float32's products run on the ordinary units, and take more registers.
FLOAT32 = {
    "forward": {64: Tile(32, 32, 8, 1), 128: Tile(32, 16, 16, 1), 256: Tile(16, 16, 8, 1)},
    "dq": {64: Tile(16, 16, 8, 1)},
    "dkv": {64: Tile(16, 16, 8, 1)},
}


def tile(what: str, K: int, dtype: torch.dtype, device: torch.device, T: int, busy: bool) -> Tile:
    """The tile of "forward", "dq" or "dkv" for T queries per example."""
    if architecture(device).processors == 0:
        return INTERPRETED
    if dtype == torch.float32:
        tiles = FLOAT32
    elif generation(device) == 9:
        banded = K <= 64 and T <= 1024  # most tiles touch the band of the bias, wider for taller tiles
        tiles = HOPPER_BUSY if busy or banded else HOPPER
    else:
        tiles = OTHERS_BUSY if busy else OTHERS
    found = tiles[what][max(K, 64)]
    rows = max(next_power_of_2(T), 16)
    if rows >= found.BM:
        return found
    few = rows == 16 and (what == "dq" or K > 64)  # which leave a thread of four warps fewer registers
    columns = found.BN if what == "dkv" else min(found.BN, 16 if few else 32)
    return Tile(rows, columns, 8 if rows == 64 else 4, 1 if few else found.num_stages)


def covers_backward(K: int, dtype: torch.dtype, device: torch.device) -> bool:
    """fp32 products of wide heads run on the ordinary units, and spill there whatever the tile."""
    return dtype != torch.float32 or K <= 64 or architecture(device).processors == 0


def t5_attention(a: Any, out: Tensor, stats: Tensor) -> None:
    """Fill out (like q, contiguous) and stats [2, H, N]."""
    call = _Call(a)
    tile = call.tile("forward")
    launch(
        t5_attention_kernel, call.query_grid(tile), a.q.device, *call.tensors, out, stats, *call.sizes, *call.strides,
        CAUSAL=a.causal, **call.constants, **tile._asdict(), fuse=True,
    )  # fmt: skip


def t5_attention_backward(
    dout: Tensor, out: Tensor, stats: Tensor, a: Any, dq: Tensor, dk: Tensor, dv: Tensor, share_k: Tensor,
    share_v: Tensor,
) -> None:  # fmt: skip
    """Fill dq, dk, dv (contiguous) and the examples' shares [B, P, H, K] fp32 of the prompt's gradients."""
    call = _Call(a)
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


def t5_attention_prompt_sum(share: Tensor, prompt_ids: Tensor | None, total: Tensor) -> None:
    """share [B, P, H, K] -> total [R, P, H, K], filled."""
    E = total[0].numel()
    launch(
        t5_attention_prompt_sum_kernel, (cdiv(E, 1024) * total.shape[0],), share.device,  # R may pass an axis' 65,535
        share, prompt_ids, total, share.shape[0], E, BE=1024, num_warps=4,
    )  # fmt: skip


class _Call:
    """The arguments that the kernels have in common."""

    def __init__(self, a: Any) -> None:
        tensors = [_unit_stride(x) for x in (a.q, a.k, a.v, a.prompt_k, a.prompt_v)]
        q, k, v, prompt_k, prompt_v = tensors
        bias, M = None, 0
        if a.bias is not None:
            bias, M = _padded(a.bias), a.bias.shape[1] // 2
        indices = contiguous(*a[6:12])
        self.seed = a.seed if a.dropout_p > 0.0 else None
        self.busy = self.seed is not None or a.causal
        self.masked = a.key_mask is not None
        self.tensors = (q, k, v, bias, prompt_k, prompt_v, *indices, self.seed)
        self.H, self.K = q.shape[-2:]
        packed = a.cu_q is not None
        B, self.T, self.S = (a.cu_q.shape[0] - 1, 0, 0) if packed else (q.shape[0], q.shape[1], k.shape[1])
        self.N, self.Nk = (q.shape[0], k.shape[0]) if packed else (B * self.T, B * self.S)
        R, self.P = (0, 0) if prompt_k is None else prompt_k.shape[:2]
        self.B, self.packed = B, packed
        scale, threshold = keep_scale(a.dropout_p), half_threshold(a.dropout_p)
        self.sizes = (B, self.T, self.S, self.P, R, M, self.N, self.Nk, a.offset, scale, threshold)
        strides: list[int] = []
        for x in tensors:
            strides += (0, 0, 0) if x is None else (0, *x.stride()[:2]) if x.dim() == 3 else x.stride()[:3]
        self.strides = tuple(strides)
        self.constants = {"H": self.H, "K": self.K, "PAD": PAD}

    def tile(self, what: str) -> Tile:
        q = self.tensors[0]
        busy = self.busy or (what == "dq" and self.masked and self.K > 64)
        return tile(what, self.K, q.dtype, q.device, self.N if self.packed else self.T, busy)

    def query_grid(self, tile: Tile) -> tuple[int, int]:
        return self._tiles(self.N, self.T, tile.BM), self.H

    def key_grid(self, tile: Tile, prompt: bool) -> tuple[int, int]:
        if prompt:
            return self.B * cdiv(self.P, tile.BN), self.H
        lead = 0 if self.seed is None else 7  # the kernel moves its tiles by so much
        return self._tiles(self.Nk + lead * self.B, self.S + lead, tile.BN), self.H

    def _tiles(self, rows: int, each: int, block: int) -> int:
        """Packed, no host knows the examples' lengths: at most one tile of each is not full."""
        return self.B and cdiv(rows, block) + self.B if self.packed else self.B * cdiv(each, block)


def _padded(bias: Tensor) -> Tensor:
    """bias [H, 2M + 1] as fp32 with its ends repeated. It stays with the tensor, for all layers of a stack read one.

    But not for another stream, which would not wait for it, nor for a graph, which is to read what bias holds then.
    """
    name, capturing = f"fastprompt_padded_{stream(bias)}", is_capturing(bias.device)
    padded: Tensor | None = None if capturing else note_on(bias, name)
    if padded is None:
        padded = functional.pad(bias.float(), (PAD, PAD), mode="replicate")
        if not capturing:
            leave_note(bias, name, padded)
    return padded


def _unit_stride(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def aot_cases() -> Iterator[tuple[Any, ...]]:
    """Launcher calls for tests/triton_aot: every head width and dtype, with everything on and with everything off, for
    few and for many rows; packed rows."""
    from fastprompt.ops._t5_attention_reference import Inputs

    meta = partial(torch.empty, device="meta")
    B, H, P, R = 4, 12, 100, 3
    index = partial(meta, dtype=torch.int64)
    widths = [(torch.bfloat16, K) for K in (16, 32, 64, 128, 256)] + [
        (torch.float32, K) for K in (64, 128, 256)
    ]
    lengths = [(dtype, K, T) for dtype, K in widths for T in (512, 2048)]  # tiles depend on them
    lengths += [(torch.bfloat16, K, T) for K in (64, 128) for T in (16, 64)]
    for dtype, K, T in lengths:
        q, k, prompt = (meta(*shape, H, K, dtype=dtype) for shape in ((B, T), (B, T), (R, P)))
        stats, share, bias = meta(2, H, B * T), meta(B, P, H, K), meta(H, 257)
        mask = meta(B, T, dtype=torch.bool)
        plain = Inputs(q, k, k, bias, *[None] * 9, 0, False, 0.0)
        dry = plain._replace(
            prompt_k=prompt,
            prompt_v=prompt,
            prompt_ids=index(B),
            prompt_lens=index(R),
            key_mask=mask,
            offsets=index(B),
        )
        full = dry._replace(seed=index(1), causal=True, dropout_p=0.1)
        rows, cu = meta(B * T, H, K, dtype=dtype), index(B + 1)
        packed = full._replace(
            q=rows, k=rows, v=rows, key_mask=None, offsets=None, cu_q=cu, cu_k=cu, causal=False
        )
        half = dtype != torch.float32
        for a in (full,) if T < 512 else (full, dry, plain, *[packed] * half) if T == 512 else (dry, plain):
            yield t5_attention, a, a.q, stats
            if covers_backward(K, dtype, q.device):
                yield t5_attention_backward, a.q, a.q, stats, a, a.q, a.k, a.k, share, share
    yield t5_attention_prompt_sum, meta(B, P, H, 64), index(B), meta(R, P, H, 64, dtype=torch.bfloat16)

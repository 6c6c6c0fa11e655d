# SPDX-License-Identifier: Apache-2.0
"""t5_attention: softmax(q k^T + bias[key - query] + mask) v over a prompt's keys and the example's own.

Tensors, tiles and sources of keys: _t5_attention_shared.py. The page fastprompt/ops/t5_attention.py has the semantics.
"""

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ._launch import launch
from ._math import LOG2E
from ._t5_attention_shared import (
    INFINITY,
    NO_KEY,
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
    weight,
)


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
    m_n = own_mask(key_mask, o_n, (o_n >= 0) & (o_n < keys))
    if key_mask is not None:
        first_key = tl.minimum(first_key, tl.where(m_n, o_n, NO_KEY))
    b_k = load(k, o_n, m_n, kn, K)
    b_s = scores(b_q, b_k, m_n, table, level, at + i_n, first, BANDED, CAUSAL, BM, BN)
    high = tl.maximum(top, tl.max(b_s, 1), propagate_nan=tl.PropagateNan.ALL)
    shift = tl.where(high == -INFINITY, 0.0, high)  # no score so far: weights of 0, not NaN
    if not EXACT:
        shift *= LOG2E
    b_w = weight(b_s, shift[:, None], EXACT)
    rescale = weight(top, shift, EXACT)
    total = total * rescale + tl.sum(b_w, 1)
    if seed is not None:
        b_w = tl.where(kept(seed, o_i, j_first + i_n, pair, threshold, BM, BN), b_w, 0.0)
    b_v = load(v, o_n, m_n, vn, K)
    acc = add_product(acc, rescale[:, None], b_w, b_v)
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
    near, far, left, right = band(table, at + begin, tiles, first, BM, M, BN)
    if table is not None:
        for tile in range(near, far):
            top, total, acc, first_key = _attend_tile(
                tile, top, total, acc, first_key, b_q, k, v, kn, vn, key_mask, begin, keys, at, table, 0.0, first, o_i,
                seed, j_first, pair, threshold, True, CAUSAL, K, BM, BN,
            )  # fmt: skip
    for i_tile in range(0, tiles - (far - near)):
        tile, level = outside(i_tile, near, far, left, right)
        top, total, acc, first_key = _attend_tile(
            tile, top, total, acc, first_key, b_q, k, v, kn, vn, key_mask, begin, keys, at, None,
            level, first, o_i, seed, j_first, pair, threshold, False, CAUSAL, K, BM, BN,
        )  # fmt: skip
    least = tl.min(first_key) if key_mask is not None else tl.where(keys > 0, 0, NO_KEY)
    return top, total, acc, least


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def t5_attention_kernel(
    q, k, v, bias, prompt_k, prompt_v, prompt_ids, prompt_lens, key_mask, offsets, cu_q, cu_k, seed, out, stats,
    B, T, S, P, R, M, N, Nk, offset, scale, threshold: tl.uint32,
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
    o_query = o_i + query_at
    table = None if bias is None else bias + h * (2 * PAD + 2 * M + 1) + PAD + M  # the entry of distance 0
    pair = b * H + h
    h64 = tl.cast(h, tl.int64)
    mask = None if key_mask is None else key_mask + tl.cast(b, tl.int64) * S

    b_q = load(q + first_row(b, begin, cu_q, qb, qn) + h64 * qh, o_i, m_i, qn, K)
    top = tl.full((BM,), -INFINITY, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, K), tl.float32)
    if prompt_k is not None:
        top, total, acc, _ = _attend(
            top, total, acc, b_q, prompt_k + prompt * pkb + h64 * pkh, prompt_v + prompt * pvb + h64 * pvh, pkn, pvn,
            None, 0, P_b, P_b, -P_b, table, M, first + query_at, o_i, seed, 0, pair, threshold, False, K, BM, BN,
        )  # fmt: skip
    base_k = k + first_row(b, key_begin, cu_k, kb, kn) + h64 * kh
    base_v = v + first_row(b, key_begin, cu_k, vb, vn) + h64 * vh
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
            b_v = load(base_v, o_n, m_n, vn, K)
            b_w = tl.zeros((BM, BN), tl.float32) + tl.where(m_n, 1.0, 0.0)[None, :]
            if seed is not None:
                b_w = tl.where(kept(seed, o_i, P_b + i_n, pair, threshold, BM, BN), b_w * scale, 0.0)
            mean = add_product(mean, 1.0, b_w, b_v)
        b_out = tl.where(starved[:, None], mean / tl.maximum(keys, 1), b_out)
    b_out = tl.where(valid, b_out, float("nan"))
    rows = begin + o_i
    o_out = (rows[:, None] * H + h) * K + tl.arange(0, K)[None, :]
    tl.store(out + o_out, b_out.to(out.dtype.element_ty), mask=m_i[:, None])
    tl.store(stats + h64 * N + rows, tl.where(starved, 0.0, top), mask=m_i)
    tl.store(stats + (H + h64) * N + rows, tl.where(starved, 0.0, total), mask=m_i)


def t5_attention(a: Any, out: Tensor, stats: Tensor) -> None:
    """Fill out (like q, contiguous) and stats [2, H, N]."""
    call = Call(a)
    tile = call.tile("forward")
    launch(
        t5_attention_kernel, call.query_grid(tile), a.q.device, *call.tensors, out, stats, *call.sizes, *call.strides,
        CAUSAL=a.causal, **call.constants, **tile._asdict(), fuse=True,
    )  # fmt: skip


def aot_cases() -> Iterator[tuple[Any, ...]]:
    """Launcher calls for tests/triton_aot."""
    for a, stats, _ in aot_inputs():
        yield t5_attention, a, a.q, stats

# SPDX-License-Identifier: Apache-2.0
"""What t5_attention's kernels share: where rows and bias are found, scores, dropout, a launch's arguments.

    q [B, T, H, K] or [Nq, H, K]   k, v [B, S, H, K] or [Nk, H, K]   prompt_k, prompt_v [R, P, H, K]
    stats [2, H, N] fp32: a row's greatest score, and the sum of exp(score - it)
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
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from fastprompt._native import stream
from fastprompt._note import leave_note, note_on
from fastprompt.dispatch.plain import is_capturing
from fastprompt.ops._dropout import drop_threshold, keep_scale
from fastprompt.ops._t5_attention_layout import laid_out

from ._launch import cdiv
from ._math import LOG2E, exp
from ._philox import ROUNDS, keep_halves
from ._t5_attention_tiles import Tile, tile

PAD = 256  # at least BM + BN of every tile: how far a tile that touches the band reaches out of it
NO_KEY = tl.constexpr(2**31 - 1)
INFINITY = tl.constexpr(float("inf"))

NOT_SPECIALIZED = ["T", "S", "P", "R", "B", "M", "N", "Nk", "offset", "threshold"]


@triton.jit
def rows_of(b, cu, n, N):
    """Rows before example b, and rows in it: n, or what cu says, which may be anything: of it what lies in [0, N)."""
    if cu is None:
        begin, count = tl.cast(b, tl.int64) * n, n
    else:
        begin = tl.minimum(tl.maximum(tl.load(cu + b), 0), N)
        count = (tl.minimum(tl.maximum(tl.load(cu + b + 1), begin), N) - begin).to(tl.int32)
    return begin, count


@triton.jit
def find_tile(i_tile, cu, n, N, B, BLOCK: tl.constexpr, LEAD: tl.constexpr = 0):
    """Example, first row within it, rows before it and rows in it, of tile i_tile; none is left if first >= rows.

    LEAD: the caller may move the tiles by so many rows towards the front.
    """
    if cu is None:
        tiles = tl.cdiv(n + LEAD, BLOCK)
        b = i_tile // tiles
        first = (i_tile - b * tiles) * BLOCK
        begin, count = rows_of(b, cu, n, N)
    else:
        b = 0
        begin, count = rows_of(b, cu, n, N)
        first = i_tile * BLOCK
        while (first >= tl.cdiv(count + LEAD, BLOCK) * BLOCK) & (b < B - 1):
            first -= tl.cdiv(count + LEAD, BLOCK) * BLOCK
            b += 1
            begin, count = rows_of(b, cu, n, N)
    return b, first, begin, count


@triton.jit
def prompt_of(b, prompt_ids, prompt_lens, R, P):
    """Which prompt example b reads, how many keys of it, and whether there is such a prompt."""
    prompt = tl.full((), 0, tl.int64) if prompt_ids is None else tl.load(prompt_ids + b)
    known = (prompt >= 0) & (prompt < R)
    prompt = tl.where(known, prompt, 0)
    keys = P if prompt_lens is None else tl.load(prompt_lens + prompt, mask=known, other=0)
    keys = tl.minimum(tl.maximum(keys, 0), P).to(tl.int32)
    return prompt, tl.where(known, keys, 0), known | (P == 0)


@triton.jit
def first_row(b, begin, cu, stride_example, stride_row):
    """Where example b's rows begin, in elements."""
    return tl.cast(b, tl.int64) * stride_example if cu is None else begin * stride_row


@triton.jit
def offset_of(b, offsets, offset):
    return offset if offsets is None else tl.maximum(tl.load(offsets + b), 0).to(tl.int32)


@triton.jit
def load(base, o_row, m_row, stride, K: tl.constexpr):
    """Rows [len(o_row), K]; zeros where m_row is false."""
    return tl.load(
        base + o_row.to(tl.int64)[:, None] * stride + tl.arange(0, K)[None, :], mask=m_row[:, None], other=0.0
    )


@triton.jit
def band(table, begin, tiles, first, count, M, BLOCK: tl.constexpr):
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
def outside(i_tile, near, far, before, behind):
    """The i-th of the tiles that are not in the band, and its bias."""
    early = i_tile < near
    return tl.where(early, i_tile, i_tile + far - near), tl.where(early, before, behind)


@triton.jit
def kept(seed, o_query, j_first, pair, threshold: tl.uint32, BM: tl.constexpr, BN: tl.constexpr):
    """What dropout keeps of keys j_first (a multiple of 8), j_first + 1, ... of queries o_query: [BM, BN]."""
    o_block = (j_first // 8 + tl.arange(0, BN // 8))[None, :] + tl.zeros((BM, 1), tl.int32)
    o_row = o_query[:, None] + tl.zeros((1, BN // 8), tl.int32)
    zero = tl.zeros((BM, BN // 8), tl.int32)
    word0, word1, word2, word3 = tl.philox(tl.load(seed), o_block, o_row, zero + pair, zero, ROUNDS)
    return keep_halves(word0, word1, word2, word3, threshold, BM, BN)


@triton.jit
def add_product(acc, scale, a, b):
    """acc scale + a b, where a is fp32 and multiplied in b's dtype.

    In float32 the product is a sum of its own. Triton would begin it at a plain addend: one chain through all tiles,
    each of whose roundings is as large as the whole sum's.
    """
    if b.dtype == tl.float32:
        return tl.fma(acc, scale, tl.dot(a, b, input_precision="ieee"))
    return tl.dot(a.to(b.dtype), b, acc * scale)


@triton.jit
def own_mask(key_mask, o_n, m_n):
    return m_n if key_mask is None else tl.load(key_mask + o_n, mask=m_n, other=0) != 0


@triton.jit
def weight(b_s, b_shift, EXACT: tl.constexpr):
    """exp(b_s - shift); unless EXACT, b_shift is shift * log2(e)."""
    return exp(b_s - b_shift) if EXACT else tl.exp2(b_s * LOG2E - b_shift)


@triton.jit
def toeplitz(table, distance, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SIGN: tl.constexpr):
    """Bias [ROWS, COLUMNS]: of `distance` in the first corner and SIGN more per column, as many less per row.

    Offsets of 64 bits let the compiler put those between a thread's elements into the load instructions.
    """
    o = SIGN * (tl.arange(0, COLUMNS).to(tl.int64)[None, :] - tl.arange(0, ROWS).to(tl.int64)[:, None])
    return tl.load(table + distance + o)


@triton.jit
def scores(
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
        b_s += toeplitz(table, at - first, BM, BN, 1)
    if CAUSAL:
        b_s = tl.where(
            (at + tl.arange(0, BN))[None, :] <= (first + tl.arange(0, BM))[:, None], b_s, -INFINITY
        )
    return b_s


class Call:
    """The arguments that the kernels have in common.

    N and Nk are the rows of all queries and keys; T = S = 0 if packed, R = P = 0 without prompts, M = 0 without bias.
    ``strides``: of q, k, v, prompt_k and prompt_v in elements, by example (or prompt; 0 if packed), row and head.
    """

    def __init__(self, a: Any) -> None:
        a = laid_out(a)
        self.q, self.packed = a.q, a.cu_q is not None
        self.H, self.K = a.q.shape[-2:]
        if a.cu_q is None:
            (self.B, self.T), self.S = a.q.shape[:2], a.k.shape[1]
            self.N, self.Nk = self.B * self.T, self.B * self.S
        else:
            self.B, self.T, self.S = a.cu_q.shape[0] - 1, 0, 0
            self.N, self.Nk = a.q.shape[0], a.k.shape[0]
        self.R, self.P = (0, 0) if a.prompt_k is None else a.prompt_k.shape[:2]
        M = 0 if a.bias is None else a.bias.shape[1] // 2
        self.strides: tuple[int, ...] = ()
        for x in (a.q, a.k, a.v, a.prompt_k, a.prompt_v):
            self.strides += (
                (0, 0, 0) if x is None else (0, *x.stride()[:2]) if x.dim() == 3 else x.stride()[:3]
            )
        bias = None if a.bias is None else padded(a.bias)
        self.seed = a.seed if a.dropout_p > 0.0 else None
        self.busy = self.seed is not None or a.causal
        self.masked = a.key_mask is not None
        indices = (a.prompt_ids, a.prompt_lens, a.key_mask, a.offsets, a.cu_q, a.cu_k)
        self.tensors = (a.q, a.k, a.v, bias, a.prompt_k, a.prompt_v, *indices, self.seed)
        scale, threshold = keep_scale(a.dropout_p), drop_threshold(a.dropout_p)
        sizes = (self.B, self.T, self.S, self.P, self.R, M, self.N, self.Nk)
        self.sizes = (*sizes, a.offset, scale, threshold)
        self.constants = {"H": self.H, "K": self.K, "PAD": PAD}

    def tile(self, what: str) -> Tile:
        busy = self.busy or (what == "dq" and self.masked and self.K > 64)
        return tile(what, self.K, self.q.dtype, self.q.device, self.N if self.packed else self.T, busy)

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


def padded(bias: Tensor) -> Tensor:
    """bias [H, 2M + 1] as fp32 with its ends repeated. It stays with the tensor, for all layers of a stack read one.

    But not for another stream, which would not wait for it, nor for a graph, which is to read what bias holds then.
    """
    name, capturing = f"fastprompt_padded_{stream(bias)}", is_capturing(bias.device)
    found: Tensor | None = None if capturing else note_on(bias, name)
    if found is None:
        found = functional.pad(bias.float(), (PAD, PAD), mode="replicate")
        if not capturing:
            leave_note(bias, name, found)
    return found


def aot_inputs() -> Iterator[tuple[Any, Tensor, Tensor]]:
    """What the kernels are compiled for ahead of time: every head width and dtype, with everything on and with
    everything off, for few and for many rows; packed rows. With the statistics, and a prompt's share of gradients."""
    from fastprompt.ops._t5_attention_reference import Inputs

    meta = partial(torch.empty, device="meta")
    B, H, P, R = 4, 12, 100, 3
    index = partial(meta, dtype=torch.int64)
    widths = [(dtype, K) for dtype in (torch.bfloat16, torch.float32) for K in (16, 32, 64, 128, 256)]
    lengths = [(dtype, K, T) for dtype, K in widths for T in (16, 512, 2048)]  # tiles depend on them
    lengths += [(torch.bfloat16, K, 64) for K in (64, 128)]
    for dtype, K, T in lengths:
        q, k, prompt = (meta(*shape, H, K, dtype=dtype) for shape in ((B, T), (B, T), (R, P)))
        bias, mask = meta(H, 257), meta(B, T, dtype=torch.bool)
        stats, share = meta(2, H, B * T), meta(B, P, H, K)
        plain = Inputs(q, k, k, bias)
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
        some = {16: (full, dry, plain), 64: (full,), 512: (full, dry, plain, packed), 2048: (dry, plain)}[T]
        yield from ((a, stats, share) for a in some if a is not packed or dtype != torch.float32)

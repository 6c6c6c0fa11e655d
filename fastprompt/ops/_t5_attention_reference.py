# SPDX-License-Identifier: Apache-2.0
"""t5_attention in plain PyTorch, one example after the other: what every kernel is read and tested against."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastprompt.ops._dropout import drop_threshold, half_words, keep_scale, philox
from fastprompt.ops._wide import wide_dtype


class Inputs(NamedTuple):
    """The op's arguments: shapes are on the page, ``fastprompt/ops/t5_attention.py``."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None = None
    prompt_k: Tensor | None = None
    prompt_v: Tensor | None = None
    prompt_ids: Tensor | None = None
    prompt_lens: Tensor | None = None
    key_mask: Tensor | None = None
    offsets: Tensor | None = None
    cu_q: Tensor | None = None
    cu_k: Tensor | None = None
    seed: Tensor | None = None
    offset: int = 0
    causal: bool = False
    dropout_p: float = 0.0


TENSORS = 13  # of them, the first ones


class Example(NamedTuple):
    """One example, everything in the wide dtype, heads first: q [H, T, K]; k, v [H, P + S, K]."""

    q: Tensor
    k: Tensor
    v: Tensor
    scores: Tensor  # [H, T, P + S], biased; -inf where not allowed, the plain 0 of a row that allows nothing
    factors: Tensor  # [H, T, P + S]: dropout's 0 or 1 / (1 - p)
    # bool [T]: rows that no key is allowed for; they take the mean of the example's own values
    starved: Tensor
    queries: slice  # of the N rows of all queries
    keys: slice  # of the rows of all own keys
    prompt: int  # which prompt
    P: int  # keys of it


def rows(x: Tensor) -> Tensor:
    """[B, T, H, K] or [N, H, K] -> [N, H, K]."""
    return x.reshape(x.shape[:-2].numel(), *x.shape[-2:])


def bounds(cu: Tensor | None, x: Tensor) -> list[int]:
    """Where each example's rows begin, and the end."""
    return cu.tolist() if cu is not None else [b * x.shape[1] for b in range(x.shape[0] + 1)]


def examples(a: Inputs) -> Iterator[Example]:
    wide = wide_dtype(a.q)
    q, k, v = rows(a.q).to(wide), rows(a.k).to(wide), rows(a.v).to(wide)
    begin_q, begin_k = bounds(a.cu_q, a.q), bounds(a.cu_k, a.k)
    for b in range(len(begin_q) - 1):
        queries, keys = slice(begin_q[b], begin_q[b + 1]), slice(begin_k[b], begin_k[b + 1])
        b_q, b_k, b_v = (x.transpose(0, 1) for x in (q[queries], k[keys], v[keys]))
        prompt = 0 if a.prompt_ids is None else int(a.prompt_ids[b])
        P = 0
        if a.prompt_k is not None and a.prompt_v is not None:
            P = a.prompt_k.shape[1] if a.prompt_lens is None else int(a.prompt_lens[prompt])
            b_k = torch.cat((a.prompt_k[prompt, :P].to(wide).transpose(0, 1), b_k), 1)
            b_v = torch.cat((a.prompt_v[prompt, :P].to(wide).transpose(0, 1), b_v), 1)
        H, T, S = b_q.shape[0], b_q.shape[1], b_k.shape[1] - P
        offset = a.offset if a.offsets is None else int(a.offsets[b])
        query_at = offset + torch.arange(T, device=q.device)
        key_at = torch.arange(-P, S, device=q.device)
        allowed = torch.ones((T, P + S), dtype=torch.bool, device=q.device)
        if a.causal:
            allowed = key_at <= query_at[:, None]
        if a.key_mask is not None:
            allowed = allowed & torch.cat((a.key_mask.new_ones(P), a.key_mask[b]))
        allowed = allowed | (key_at < 0)
        starved = ~allowed.any(1)
        unread = ~(allowed.any(0) | starved.any())[:, None]  # [P + S, 1]: a NaN there must not spread
        b_k, b_v = b_k.masked_fill(unread, 0.0), b_v.masked_fill(unread, 0.0)
        scores = b_q @ b_k.transpose(1, 2)
        if a.bias is not None:
            M = a.bias.shape[1] // 2
            scores = scores + a.bias.to(wide)[:, (key_at - query_at[:, None]).clamp(-M, M) + M]
        scores = torch.where(allowed | starved[:, None], scores, -torch.inf)
        scores = torch.where(starved[:, None], 0.0, scores)
        factors = torch.ones_like(scores)
        if a.seed is not None and a.dropout_p > 0.0:
            keep = keep_keys(a.seed, b * H, H, T, P + S, a.dropout_p)
            factors = keep.to(wide) * keep_scale(a.dropout_p)
        yield Example(b_q, b_k, b_v, scores, factors, starved, queries, keys, prompt, P)


def keep_keys(seed: Tensor, first: int, H: int, T: int, keys: int, dropout_p: float) -> Tensor:
    """bool [H, T, keys]: key j of query i and head h takes half-word j % 8 of block (j // 8, i, first + h, 0)."""
    block = torch.arange((keys + 7) // 8, device=seed.device)
    row = torch.arange(T, device=seed.device)[:, None] << 32
    words = [philox(seed, row + block, stream=first + h) for h in range(H)]
    if not H:
        return row.new_zeros((0, T, keys), dtype=torch.bool)
    return half_words(torch.stack(words)).flatten(2)[:, :, :keys] >= drop_threshold(dropout_p)


def forward(a: Inputs) -> tuple[Tensor, Tensor]:
    """out like q; stats wide [2, H, N] = (a, t): weights are exp(score - a) / t, and t = 0 if no key is allowed."""
    wide = wide_dtype(a.q)
    out = torch.zeros(rows(a.q).shape, dtype=wide, device=a.q.device)
    stats = torch.zeros((2, a.q.shape[-2], out.shape[0]), dtype=wide, device=a.q.device)
    for e in examples(a):
        if e.k.shape[1]:
            out[e.queries] = ((e.scores.softmax(-1) * e.factors) @ e.v).transpose(0, 1)
            top = e.scores.amax(-1)
            total = torch.where(e.starved, 0.0, (e.scores - top[..., None]).exp().sum(-1))
            stats[:, :, e.queries] = torch.stack((top, total))
    return out.reshape(a.q.shape).to(a.q.dtype), stats


def backward(dout: Tensor, a: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv in their tensors' dtypes, and each example's share of the prompt's: wide [B, P, H, K].

    dout . out of a row is the sum of its weights times their gradients. Weights are computed again from the scores:
    another backend's statistics are of scores rounded otherwise, as in TF32.
    """
    wide = wide_dtype(a.q)
    dq, dk, dv = (torch.zeros(rows(x).shape, dtype=wide, device=x.device) for x in (a.q, a.k, a.v))
    dout = rows(dout).to(wide)
    B = len(bounds(a.cu_q, a.q)) - 1
    P = 0 if a.prompt_k is None else a.prompt_k.shape[1]
    share_k, share_v = (torch.zeros((B, P, *a.q.shape[-2:]), dtype=wide, device=a.q.device) for _ in "kv")
    for b, e in enumerate(examples(a)):
        b_dout = dout[e.queries].transpose(0, 1)
        weights = e.scores.softmax(-1)
        dweights = (b_dout @ e.v.transpose(1, 2)) * e.factors
        dscores = weights * (dweights - (weights * dweights).sum(-1, keepdim=True))
        b_dk, b_dv = dscores.transpose(1, 2) @ e.q, (weights * e.factors).transpose(1, 2) @ b_dout
        dq[e.queries] = (dscores @ e.k).transpose(0, 1)
        dk[e.keys], dv[e.keys] = b_dk[:, e.P :].transpose(0, 1), b_dv[:, e.P :].transpose(0, 1)
        share_k[b, : e.P], share_v[b, : e.P] = b_dk[:, : e.P].transpose(0, 1), b_dv[:, : e.P].transpose(0, 1)
    dq, dk, dv = (d.reshape(x.shape).to(x.dtype) for d, x in ((dq, a.q), (dk, a.k), (dv, a.v)))
    return dq, dk, dv, share_k, share_v

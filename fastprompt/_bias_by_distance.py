# SPDX-License-Identifier: Apache-2.0
"""A dense T5 bias as the table by distance that t5_attention reads, and back."""

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastprompt._allowed import Allowed
from fastprompt._note import TABLE, leave_note, note_on
from fastprompt.dispatch.plain import may_keep


def makes_t5s_bias(attention: nn.Module) -> bool:
    """By transformers' own methods, as a function of distance?"""
    for name in ("compute_bias", "_relative_position_bucket"):
        method = getattr(attention, name, None)
        if isinstance(method, MethodType):  # torch.compile asks no method for its function's attributes
            method = method.__func__
        # Where its code is from, which functools.wraps does not copy.
        if not getattr(method, "__globals__", {}).get("__name__", "").startswith("transformers."):
            return False
    return True


def table_of(bias: Tensor, allowed: Allowed, layer: Any) -> Tensor | None:
    """What t5_attention is told of a bias [1, H, T, S], a function of j - i: [H, 2M + 1] by key - query.

    A table, which fused layers hand on in place of that bias, stays as it is; one that comes with the keys goes before.
    All layers of a stack ask for that of one bias.
    """
    if allowed.brings_bias():
        return allowed.bias_of(layer)
    if bias.dim() == 2:
        return bias
    if isinstance(allowed.offset, Tensor) or not may_keep(bias):
        return _table(bias.detach(), allowed)
    causal, offset, found = note_on(bias, TABLE) or (None, None, None)
    if (causal, offset) != (allowed.causal, allowed.offset):
        found = _table(bias.detach(), allowed)
        leave_note(bias, TABLE, (allowed.causal, allowed.offset, found))
    return found


def _table(bias: Tensor, allowed: Allowed) -> Tensor:
    if bias.dtype != torch.float64:
        bias = bias.float()  # before cat, which autocast refuses in the other half precision
    T, S = bias.shape[2:]  # key - query = j - i - offset
    diagonals = torch.cat((bias[0, :, :, 0].flip(1), bias[0, :, 0, 1:]), 1)  # entry T - 1 + j - i
    if not allowed.causal:
        M = max(T, S) - 1
        return functional.pad(diagonals, (M - T + 1, M - S + 1))
    # No key after the query is read: the table's right half stays empty.
    if isinstance(allowed.offset, Tensor):
        M = S - 1
        index = torch.arange(T - 1 - M, T, device=bias.device) + allowed.offset
        return functional.pad(diagonals[:, index.clamp(0, T + S - 2)], (0, M))
    M = allowed.offset + T - 1
    return functional.pad(diagonals[:, : M + 1], (0, M))


def dense_bias(table: Tensor, T: int, S: int, offset: int | Tensor) -> Tensor:
    """The bias [1, H, T, S] of a table by distance [H, 2M + 1]."""
    M = table.shape[1] // 2
    query_at = torch.arange(T, device=table.device) + offset
    distance = torch.arange(S, device=table.device) - query_at[:, None]
    return table[:, distance.clamp(-M, M) + M][None]

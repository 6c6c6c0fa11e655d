# SPDX-License-Identifier: Apache-2.0
"""A step of generation: an attention layer over what a cache holds, without gradient.

Where one token is computed the host decides, so there is as little as can be between the kernels: no module is called,
and the bias is a table by distance, where the stock layer computes a dense one for every token.
"""

from typing import Any

from torch import Tensor
from transformers import EncoderDecoderCache

from fastprompt._allowed import Allowed
from fastprompt._note import PER_ROW, leave_note, note_on
from fastprompt.dispatch import direct
from fastprompt.modules._frozen import add, linear
from fastprompt.ops._t5_attention_reference import Inputs


def step(
    weights: dict[str, Tensor],
    eps: float,
    heads: int,
    layer: int,
    x: Tensor,
    bias: Tensor | None,
    allowed: Allowed,
    past: EncoderDecoderCache,
) -> Tensor:
    """x [B, T, D] -> y [B, T, D]; self-attention adds its keys and values to the cache.

    ``weights`` of layer_norm, q, k, v, o; ``bias`` fp32 [H, 2M + 1], None in cross-attention.
    """
    shape = (*x.shape[:2], heads, -1)
    n, _ = direct.rms_norm(x, weights["layer_norm"], eps)
    q = linear(n, weights["q"]).view(shape)
    if allowed.causal:
        k, v = (linear(n, weights[name]).view(shape).transpose(1, 2) for name in "kv")
        k, v = past.self_attention_cache.update(k, v, layer)  # [B, H, S, K]
    else:
        held: Any = past.cross_attention_cache.layers[layer]
        k, v = held.keys, held.values
    offset: Any = allowed.offset if allowed.causal else 0
    offsets = None
    if isinstance(offset, Tensor):  # a static cache's, whose free slots come after the query
        offset, offsets = 0, _per_row(offset, len(x))
    inputs = Inputs(
        q,
        k.transpose(1, 2),
        v.transpose(1, 2),
        bias,
        *allowed.prompt_of(layer),
        allowed.mask,
        offsets,
        offset=offset,
        causal=allowed.causal,
    )
    out, _ = direct.t5_attention(*inputs)
    return add(linear(out.view(*x.shape[:2], -1), weights["o"]), x, None, 0.0)


def _per_row(offset: Tensor, rows: int) -> Tensor:
    """int64 [B] of a number, which all layers of a stack are handed."""
    found: Tensor | None = note_on(offset, PER_ROW)
    if found is None:
        found = offset.expand(rows).clone()  # no view: what offset holds on to must not hold on to it
        leave_note(offset, PER_ROW, found)
    return found

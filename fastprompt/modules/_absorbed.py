# SPDX-License-Identifier: Apache-2.0
"""Cross-attention of few queries, with the key and value weights absorbed: no keys or values of the encoder's output.

    q' = q_h Wk_h          [H T, D]     score = q k^T = (q Wk_h) states^T = q' states^T
    c  = w~ states         [H T, D]     out_h = w~ (states Wv_h^T) = c_h Wv_h^T

per head h, w~ the dropped softmax w of the scores. Keys and values cost 4 B S D I multiplications forward and backward,
this 6 B T H S D, and it saves nothing of the encoder's length but, under "speed", w. It pays while T < 2 K / 3.

Backward: dc = dout_h Wv_h; dw = drop(dc states^T); dscore = w (dw - sum w dw); dq' = dscore states;
dstates = w~^T dc + dscore^T q'; dq = dq'_h Wk_h^T.

The same function as with keys and values, by associativity. A row that may attend to nothing takes the mean, as there.

A prompt that all examples share brings keys and values of its own: they stand in front, and are read as they are.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastprompt.dispatch import direct
from fastprompt.modules._frozen import linear, products

if TYPE_CHECKING:
    from fastprompt.modules._attend import Attend, Options

Kept = tuple[Tensor, ...]  # q' [B, H T, D], w [B, H T, P + S], and with a prompt q [B, T, I]


def pays(T: int, K: int, differentiable: bool) -> bool:
    """Is it fewer multiplications than keys and values are, for T queries? Forward: 2 T H S D against 2 S D I."""
    return 3 * T < 2 * K if differentiable else T < K


def _by_head(a: "Attend", x: Tensor) -> Tensor:
    """[B, T, H X] -> [H, B T, X]"""
    return x.view(x.shape[0] * x.shape[1], a.options.heads, -1).transpose(0, 1)


def _by_row(x: Tensor, B: int) -> Tensor:
    """[H, B T, X] -> [B, T, H X]"""
    return x.unflatten(1, (B, -1)).permute(1, 2, 0, 3).flatten(2)


def _by_example(x: Tensor, B: int) -> Tensor:
    """[H, B T, X] -> [B, H T, X]"""
    return x.unflatten(1, (B, -1)).transpose(0, 1).flatten(1, 2)


def _of_example(a: "Attend", x: Tensor) -> Tensor:
    """[B, H T, X] -> [H, B T, X]"""
    return x.unflatten(1, (a.options.heads, -1)).transpose(0, 1).flatten(1, 2)


def _absorb(a: "Attend", x: Tensor, weight: Tensor) -> Tensor:
    """x [B, T, I] times weight [I, D], head by head: [B, H T, D]."""
    product = products((_by_head(a, x), weight.view(a.options.heads, -1, weight.shape[-1])))
    return _by_example(product, x.shape[0])


def _release(a: "Attend", x: Tensor, weight: Tensor) -> Tensor:
    """The transpose of ``_absorb``: x [B, H T, D] times weight^T, head by head: [B, T, I]."""
    product = linear(_of_example(a, x), weight.view(a.options.heads, -1, weight.shape[-1]))
    return _by_row(product, x.shape[0])


def _against_prompt(a: "Attend", x: Tensor, prompt: Tensor) -> Tensor:
    """x [B, T, I] times prompt^T [1, P, H, K], head by head: [B, H T, P]."""
    return _by_example(linear(_by_head(a, x), prompt[0].transpose(0, 1)), x.shape[0])


def _of_prompt(a: "Attend", weights: Tensor, prompt: Tensor) -> Tensor:
    """weights [B, H T, P] times prompt [1, P, H, K], head by head: [B, T, I]."""
    return _by_row(products((_of_example(a, weights), prompt[0].transpose(0, 1))), weights.shape[0])


def _to_prompt(a: "Attend", weights: Tensor, x: Tensor) -> Tensor:
    """The sum over the batch of weights^T [B, H T, P] times x [B, T, I]: [1, P, H, K]."""
    return torch.bmm(_of_example(a, weights).transpose(1, 2), _by_head(a, x)).transpose(0, 1)[None]


def _attend(a: "Attend", n: Tensor) -> Kept:
    assert a.states is not None
    q = linear(n, a.wq)
    absorbed = _absorb(a, q, a.wk)
    scores = linear(absorbed, a.states)
    wide = scores if scores.dtype == torch.float64 else scores.float()
    if a.key_mask is not None:
        wide = wide.masked_fill(~a.key_mask[:, None, :], torch.finfo(wide.dtype).min)
    if a.prompt_k is None:
        return absorbed, wide.softmax(-1)
    before = _against_prompt(a, q, a.prompt_k).to(wide.dtype)
    return absorbed, torch.cat((before, wide), -1).softmax(-1), q


def _dropped(a: "Attend", weights: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """weights [B, H T, P + S] with dropout: those of the prompt, those of the states."""
    p, P = a.options.weight_p, _prompt_length(a)
    kept = (direct.dropout_add(weights, None, a.weight_seed, p) if p > 0.0 else weights).to(dtype)
    return kept[..., :P], kept[..., P:]


def _prompt_length(a: "Attend") -> int:
    return 0 if a.prompt_k is None else a.prompt_k.shape[1]


def forward(a: "Attend", n: Tensor) -> tuple[Tensor, Kept]:
    """n [B, T, D] -> out [B, T, I], and what backward needs beside."""
    assert a.states is not None
    kept = _attend(a, n)
    before, weights = _dropped(a, kept[1], n.dtype)
    out = _release(a, products((weights, a.states)), a.wv)
    if a.prompt_v is not None:
        out = out + _of_prompt(a, before, a.prompt_v)
    return out, kept


def kept_by(o: "Options", kept: Kept) -> Kept:
    """What a policy saves of it: all of it is a small product away."""
    return kept if o.memory == "speed" else ()


def keeps_out(_x: Tensor) -> bool:
    """Does backward read out?"""
    return False


def again(a: "Attend", norm: Callable[[], Tensor], kept: Kept) -> Kept:
    """All of it, from what was saved; ``norm`` computes n again."""
    return kept or _attend(a, norm())


def backward(
    a: "Attend", dout: Tensor, _out: Tensor | None, kept: Kept, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients of n [B, T, D], states, prompt_k and prompt_v, those of ``needs``."""
    assert a.states is not None
    absorbed, weights, *q = kept
    P = _prompt_length(a)
    needs_n, needs_states, needs_k, needs_v = needs
    dcontext = _absorb(a, dout, a.wv)
    dweights = linear(dcontext, a.states)
    if a.prompt_v is not None:
        dweights = torch.cat((_against_prompt(a, dout, a.prompt_v), dweights), -1)
    dweights = torch.cat(_dropped(a, dweights.to(weights.dtype), weights.dtype), -1)
    dscores = (weights * (dweights - (weights * dweights).sum(-1, keepdim=True))).to(dout.dtype)
    before, after = dscores[..., :P], dscores[..., P:]
    dn = dstates = dk = dv = None
    if needs_n:
        dq = _release(a, products((after, a.states)), a.wk)
        if a.prompt_k is not None:
            dq += _of_prompt(a, before, a.prompt_k)
        dn = products((dq, a.wq))
    if needs_states or needs_v:
        dropped_before, dropped_after = _dropped(a, weights, dout.dtype)
    if needs_states:
        dstates = products((dropped_after.transpose(1, 2), dcontext), (after.transpose(1, 2), absorbed))
    if needs_k:
        dk = _to_prompt(a, before, q[0])
    if needs_v:
        dv = _to_prompt(a, dropped_before, dout)
    return dn, dstates, dk, dv

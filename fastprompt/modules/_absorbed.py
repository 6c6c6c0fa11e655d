# SPDX-License-Identifier: Apache-2.0
"""Cross-attention of few queries, with the key and value weights absorbed: no keys or values of the encoder's output.

    q' = q_h Wk_h          [H T, D]     score = q k^T = (q Wk_h) states^T = q' states^T
    c  = w~ states         [H T, D]     out_h = w~ (states Wv_h^T) = c_h Wv_h^T

per head h, w~ the dropped softmax w of the scores. Keys and values cost 4 B S D I multiplications forward and backward,
this 6 B T H S D, and it saves nothing of the encoder's length but, under "speed", w. It pays while T < 2 K / 3.

Backward: dc = dout_h Wv_h; dw = drop(dc states^T); dscore = w (dw - sum w dw); dq' = dscore states;
dstates = w~^T dc + dscore^T q'; dq = dq'_h Wk_h^T.

The same function as with keys and values, by associativity. A row that may attend to nothing takes the mean, as there.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastprompt.modules._frozen import linear, ops

if TYPE_CHECKING:
    from fastprompt.modules._attend import Attend, Options

Kept = tuple[Tensor, ...]  # q' [B, H T, D], w [B, H, T, S]


def pays(T: int, K: int, differentiable: bool) -> bool:
    """Is it fewer multiplications than keys and values are, for T queries? Forward: 2 T H S D against 2 S D I."""
    return 3 * T < 2 * K if differentiable else T < K


def _absorb(a: "Attend", x: Tensor, weight: Tensor) -> Tensor:
    """x [B, T, I] times weight [I, D], head by head: [B, H T, D]."""
    H = a.options.heads
    B, T, _ = x.shape
    by_head = x.view(B * T, H, -1).transpose(0, 1)  # [H, B T, K]
    product = torch.bmm(by_head, weight.view(H, -1, weight.shape[-1]))  # [H, B T, D]
    return product.view(H, B, T, -1).transpose(0, 1).reshape(B, H * T, -1)


def _release(a: "Attend", x: Tensor, weight: Tensor) -> Tensor:
    """The transpose of ``_absorb``: x [B, H T, D] times weight^T, head by head: [B, T, I]."""
    H = a.options.heads
    B, HT, D = x.shape
    by_head = x.view(B, H, -1, D).transpose(0, 1).reshape(H, -1, D)  # [H, B T, D]
    product = torch.bmm(by_head, weight.view(H, -1, D).transpose(1, 2))  # [H, B T, K]
    return product.view(H, B, HT // H, -1).permute(1, 2, 0, 3).reshape(B, HT // H, -1)


def _attend(a: "Attend", n: Tensor) -> Kept:
    assert a.states is not None
    absorbed = _absorb(a, linear(n, a.wq), a.wk)
    scores = torch.bmm(absorbed, a.states.transpose(1, 2))
    wide = scores if scores.dtype == torch.float64 else scores.float()
    if a.key_mask is not None:
        wide = wide.masked_fill(~a.key_mask[:, None, :], torch.finfo(wide.dtype).min)
    return absorbed, wide.softmax(-1)


def _dropped(a: "Attend", weights: Tensor, dtype: torch.dtype) -> Tensor:
    p = a.options.weight_p
    kept = ops.dropout_add(weights, None, a.weight_seed, p) if p > 0.0 else weights
    return kept.to(dtype)


def forward(a: "Attend", n: Tensor) -> tuple[Tensor, Kept]:
    """n [B, T, D] -> out [B, T, I], and what backward needs beside."""
    assert a.states is not None
    absorbed, weights = _attend(a, n)
    context = torch.bmm(_dropped(a, weights, n.dtype), a.states)
    return _release(a, context, a.wv), (absorbed, weights)


def kept_by(o: "Options", kept: Kept) -> Kept:
    """What a policy saves of it: all of it is a small product away."""
    return kept if o.memory == "speed" else ()


def again(a: "Attend", norm: Callable[[], Tensor], kept: Kept) -> Kept:
    """All of it, from what was saved; ``norm`` computes n again."""
    return kept or _attend(a, norm())


def backward(
    a: "Attend", dout: Tensor, out: Tensor, kept: Kept, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients of n [B, T, D] and states, those of ``needs``."""
    assert a.states is not None
    absorbed, weights = kept
    needs_n, needs_states, *_ = needs
    dcontext = _absorb(a, dout, a.wv)
    dweights = torch.bmm(dcontext, a.states.transpose(1, 2)).to(weights.dtype)
    dweights = _dropped(a, dweights, weights.dtype)
    dscores = (weights * (dweights - (weights * dweights).sum(-1, keepdim=True))).to(dout.dtype)
    dn = dstates = None
    if needs_n:
        dn = _release(a, torch.bmm(dscores, a.states), a.wk) @ a.wq
    if needs_states:
        dstates = torch.bmm(_dropped(a, weights, dout.dtype).transpose(1, 2), dcontext)
        dstates.baddbmm_(dscores.transpose(1, 2), absorbed)
    return dn, dstates, None, None

# SPDX-License-Identifier: Apache-2.0
"""Attention of projected queries over projected keys: t5_attention between the products of q, k and v."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from fastprompt.dispatch import direct
from fastprompt.modules._frozen import linear, products
from fastprompt.ops._t5_attention_reference import Inputs
from fastprompt.ops.t5_attention import keeps_out as keeps_out  # Does backward read out?
from fastprompt.ops.t5_attention import prompt_sum

if TYPE_CHECKING:
    from fastprompt.modules._attend import Attend, Options

Kept = tuple[Tensor, ...]  # stats, q, k, v


def project(a: "Attend", n: Tensor) -> list[Tensor]:
    """q, k, v [B, T or S, H, K]; packed rows [N, H, K]."""
    source = n if a.states is None else a.states
    flat = (linear(n, a.wq), linear(source, a.wk), linear(source, a.wv))
    heads = [x.unflatten(-1, (a.options.heads, -1)) for x in flat]
    return heads if a.cu is None else [x.flatten(0, 1) for x in heads]


def _inputs(a: "Attend", qkv: list[Tensor]) -> Inputs:
    """The arguments of the op t5_attention."""
    q, k, v = qkv
    return Inputs(
        q,
        k,
        v,
        bias=a.bias,
        prompt_k=a.prompt_k,
        prompt_v=a.prompt_v,
        prompt_ids=a.prompt_ids,
        prompt_lens=a.prompt_lens,
        key_mask=a.key_mask,
        cu_q=a.cu,
        cu_k=a.cu,
        seed=a.weight_seed,
        causal=a.options.causal,
        dropout_p=a.options.weight_p,
    )


def forward(a: "Attend", n: Tensor) -> tuple[Tensor, Kept]:
    """n [B, T, D] -> out [B, T, I], and what backward needs beside."""
    qkv = project(a, n)
    out, stats = direct.t5_attention(*_inputs(a, qkv))
    return out.view(*n.shape[:-1], -1), (stats, *qkv)


def kept_by(o: "Options", kept: Kept) -> Kept:
    """What a policy saves of it."""
    return kept if keeps_projections(o.memory, o.causal) else kept[:1]


def keeps_projections(memory: str, decoder: bool) -> bool:
    """q, k and v are three products away; in a decoder, of few rows."""
    return memory == "speed" or (memory == "balanced" and not decoder)


def again(a: "Attend", norm: Callable[[], Tensor], kept: Kept) -> Kept:
    """All of it, from what was saved; ``norm`` computes n again."""
    return kept if len(kept) > 1 else (*kept, *project(a, norm()))


def backward(
    a: "Attend", dout: Tensor, out: Tensor | None, kept: Kept, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients of n [B, T or rows, D], states, prompt_k and prompt_v, those of ``needs``."""
    stats, *qkv = kept
    shape = qkv[0].shape
    out = None if out is None else out.reshape(shape)
    grads = direct.t5_attention_backward(dout.reshape(shape), out, stats, *_inputs(a, qkv))
    dq, dk, dv = (grad.flatten(-2) for grad in grads[:3])
    needs_n, needs_states, *needs_prompt = needs
    dn = dstates = None
    if needs_n:
        pairs = [(dq, a.wq)] if a.states is not None else [(dq, a.wq), (dk, a.wk), (dv, a.wv)]
        if a.options.rows is not None:
            pairs = [(grad[:, : a.options.rows], weight) for grad, weight in pairs]
        dn = products(*pairs).view(dout.shape[0], -1, a.w.shape[0])
    if needs_states:
        dstates = products((dk, a.wk), (dv, a.wv))
    prompts = [
        prompt_sum(share, a.prompt_ids, prompt, need)
        for share, prompt, need in zip(grads[3:], (a.prompt_k, a.prompt_v), needs_prompt, strict=True)
    ]
    return dn, dstates, *prompts

# SPDX-License-Identifier: Apache-2.0
"""T5's attention layers as one differentiable function: y = x + dropout(wo(attention(norm(x))))

Saved for backward, per row: x [D], the attention's output [I], two fp32 per head, rstd; by memory policy also

    speed, balanced     q, k and v [3 I]
    lean                nothing: the norm and the q, k, v products are computed again, the attention never is

and of a cross-attention layer the encoder's output, which all layers share, in place of k and v.

A call that leaves use_cache on gets its cache filled, as from transformers but without gradient; turn it off in
training to save that memory. With a cache that holds something (generation), with attention weights as output, or with
a mask of the user's own, the stock layer runs; its attention function is fastprompt's (hf_attention) where it can be.

Source: transformers T5LayerSelfAttention, T5LayerCrossAttention.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import EncoderDecoderCache

from fastprompt import hf_attention
from fastprompt.modules._frozen import (
    Origin,
    add,
    dropped,
    linear,
    norm_gradient,
    obstacle,
    ops,
    origin_of,
    products,
    rate,
    ready,
    restored_input,
    saved_input,
)
from fastprompt.ops._dropout import new_seed
from fastprompt.ops.t5_attention import HEAD_WIDTHS


class Options(NamedTuple):
    eps: float
    heads: int
    causal: bool
    weight_p: float
    outer_p: float
    memory: str
    save: bool


class FrozenAttention(torch.autograd.Function):
    """x [B, T, D], states [B, S, D] or None (self-attention) -> y [B, T, D], and without gradient out [B, T, I] and
    k, v [B, S, H, K]."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        states: Tensor | None,
        origin: Origin | None,
        weights: tuple[Tensor, ...],  # norm, q, k, v, o
        bias: Tensor | None,
        key_mask: Tensor | None,
        weight_seed: Tensor | None,
        outer_seed: Tensor | None,
        o: Options,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        w, *_, wo = weights
        n, rstd = ops.rms_norm(x, w, o.eps)
        qkv = _project(n, states, weights, o.heads)
        out, stats = ops.t5_attention(*_inputs(qkv, bias, key_mask, weight_seed, o))
        flat = out.flatten(2)
        if o.save:
            inputs, ctx.rates = saved_input(x, origin)
            kept = [states] if o.memory == "lean" else qkv
            ctx.options, ctx.cross, ctx.kept = o, states is not None, len(kept)
            ctx.save_for_backward(
                *weights, bias, key_mask, weight_seed, outer_seed, rstd, out, stats, *kept, *inputs
            )
        _, k, v = qkv
        ctx.mark_non_differentiable(flat, k, v)
        return add(linear(flat, wo), x, outer_seed, o.outer_p), flat, k, v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, *_others: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        o = ctx.options
        w, wq, wk, wv, wo, bias, key_mask, weight_seed, outer_seed, rstd, out, stats, *rest = (
            ctx.saved_tensors
        )
        weights = (w, wq, wk, wv, wo)
        kept, x = rest[: ctx.kept], restored_input(rest[ctx.kept :], ctx.rates)
        qkv = kept
        if o.memory == "lean":
            (states,) = kept
            qkv = _project(ops.rms_norm(x, w, o.eps)[0], states, weights, o.heads)
        dout = (dropped(dy, outer_seed, o.outer_p) @ wo).view(out.shape)
        grads = ops.t5_attention_backward(dout, out, stats, *_inputs(qkv, bias, key_mask, weight_seed, o))
        dq, dk, dv = (grad.flatten(2) for grad in grads[:3])
        dx = dstates = None
        if ctx.needs_input_grad[0]:
            pairs = [(dq, wq)] if ctx.cross else [(dq, wq), (dk, wk), (dv, wv)]
            dx = norm_gradient(products(*pairs), dy, x, w, rstd)
        if ctx.needs_input_grad[1]:
            dstates = products((dk, wk), (dv, wv))
        return dx, dstates, *(None,) * 7


def _project(n: Tensor, states: Tensor | None, weights: tuple[Tensor, ...], heads: int) -> list[Tensor]:
    """q, k, v [B, T or S, H, K]."""
    _, wq, wk, wv, _ = weights
    source = n if states is None else states
    flat = (linear(n, wq), linear(source, wk), linear(source, wv))
    return [x.unflatten(-1, (heads, -1)) for x in flat]


def _inputs(
    qkv: list[Tensor], bias: Tensor | None, key_mask: Tensor | None, seed: Tensor | None, o: Options
) -> tuple[Any, ...]:
    """The arguments of the op t5_attention."""
    no_prompt, no_offsets, not_packed = (None,) * 4, None, (None, None)
    return *qkv, bias, *no_prompt, key_mask, no_offsets, *not_packed, seed, 0, o.causal, o.weight_p


class FastAttention:
    """What the mixins for self- and cross-attention share."""

    kernel = "frozen_attention: rms_norm, t5_attention, dropout_add"
    attention_name: str
    layer_norm: Any
    dropout: Any
    fastprompt_memory: str
    fastprompt_bias: tuple[
        Any, ...
    ] = ()  # the attention that computes the stack's bias; in a tuple it is no child

    def _children(self) -> dict[str, Any]:
        attention = getattr(self, self.attention_name)
        return {**{name: getattr(attention, name) for name in "qkvo"}, "layer_norm": self.layer_norm}

    def fastprompt_obstacle(self) -> str | None:
        attention = getattr(self, self.attention_name)
        if attention.key_value_proj_dim not in HEAD_WIDTHS:
            widths = ", ".join(map(str, HEAD_WIDTHS))
            return f"its heads are {attention.key_value_proj_dim} wide, kernels take {widths}"
        if self._bias_is_trained():
            return "relative_attention_bias.weight is trained"
        return obstacle(self._children())

    def _bias_is_trained(self) -> bool:
        """Asked of the weight: reentrant checkpointing lets the bias itself require a gradient that nobody reads."""
        return any(each.relative_attention_bias.weight.requires_grad for each in self.fastprompt_bias)

    def _covers(self, allowed: Any, past: Any, inputs: tuple[Tensor, ...], kwargs: dict[str, Any]) -> bool:
        return (
            isinstance(allowed, hf_attention.Keys)
            and (past is None or self._is_fresh(past))
            and isinstance(allowed.offset, int)
            and allowed.offset == 0
            and not hf_attention.wants_weights(getattr(self, self.attention_name), kwargs)
            and getattr(self, self.attention_name).key_value_proj_dim in HEAD_WIDTHS
            and ready(self._children(), *inputs)
        )

    def _is_fresh(self, past: Any) -> bool:
        """Is the cache still to be filled?"""
        attention = getattr(self, self.attention_name)
        if not isinstance(past, EncoderDecoderCache):
            return False
        length = self._cache(past).get_seq_length(attention.layer_idx)
        return isinstance(length, int) and length == 0

    def _cache(self, past: Any) -> Any:
        return (
            past.self_attention_cache
            if self.attention_name == "SelfAttention"
            else past.cross_attention_cache
        )

    def _run(
        self, x: Tensor, states: Tensor | None, bias: Tensor | None, allowed: hf_attention.Keys, past: Any
    ) -> Tensor:
        attention, memory = getattr(self, self.attention_name), self.fastprompt_memory
        children = self._children()
        weights = (self.layer_norm.weight, *(children[name].weight for name in "qkvo"))
        weight_p, outer_p = attention.dropout if attention.training else 0.0, rate(self.dropout)
        seeds = [new_seed(x.device) if p > 0.0 else None for p in (weight_p, outer_p)]
        wants = x.requires_grad or (states is not None and states.requires_grad)
        save = torch.is_grad_enabled() and wants
        origin = origin_of(x, memory)
        options = Options(
            self.layer_norm.variance_epsilon,
            attention.n_heads,
            allowed.causal,
            weight_p,
            outer_p,
            memory,
            save,
        )
        y, out, k, v = FrozenAttention.apply(x, states, origin, weights, bias, allowed.mask, *seeds, options)
        if past is not None:
            self._cache(past).update(k.transpose(1, 2), v.transpose(1, 2), attention.layer_idx)
            if states is not None:
                past.is_updated[attention.layer_idx] = True
        if memory == "lean" and save and not torch.compiler.is_compiling():
            step = (out, weights[-1], seeds[1], outer_p)
            before = Origin(x.detach(), ()) if origin is None else origin
            y.fastprompt_origin = Origin(before.base, (*before.steps, step))
        return y


class FastSelfAttention(FastAttention):
    """Mixin for T5LayerSelfAttention."""

    attention_name = "SelfAttention"

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        position_bias: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, None]:
        if self._covers(attention_mask, past_key_values, (hidden_states,), kwargs):
            bias = position_bias
            attention, T = self.SelfAttention, hidden_states.shape[1]  # type: ignore[attr-defined]
            if bias is None and attention.has_relative_attention_bias:
                bias = attention.compute_bias(T, T, device=hidden_states.device)
            shape = (1, attention.n_heads, T, T)
            if (
                bias is not None
                and bias.shape == shape
                and self.fastprompt_bias
                and not self._bias_is_trained()
            ):
                table = hf_attention._table(bias.detach(), attention_mask)
                return self._run(hidden_states, None, table, attention_mask, past_key_values), bias, None
        return super().forward(  # type: ignore[misc]
            hidden_states, attention_mask, position_bias, past_key_values, **kwargs
        )


class FastCrossAttention(FastAttention):
    """Mixin for T5LayerCrossAttention."""

    attention_name = "EncDecAttention"

    def forward(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor,
        attention_mask: Any = None,
        position_bias: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, None]:
        inputs = (hidden_states, key_value_states)
        if self._covers(attention_mask, past_key_values, inputs, kwargs) and not attention_mask.causal:
            y = self._run(hidden_states, key_value_states, None, attention_mask, past_key_values)
            return y, position_bias, None
        return super().forward(  # type: ignore[misc]
            hidden_states, key_value_states, attention_mask, position_bias, past_key_values, **kwargs
        )

# SPDX-License-Identifier: Apache-2.0
"""T5's attention layers as one differentiable function: y = x + dropout(wo(attention(norm(x))))

Saved for backward, per row: rstd, two fp32 per head; by memory policy also

    speed       x [D], q, k and v [3 I], and the attention's output [I] where its backward reads that: on a GPU
    balanced    the same and that output, but x only at the beginning of a block: inside, it is computed from that
                (_origin.py); in a decoder, whose rows are few, as lean
    lean        without q, k and v: the norm and the three products are computed again, the attention never is
    minimal     only x at the beginning of a block: the attention is computed again

and of a cross-attention layer the encoder's output, which all layers share, in place of k and v; or, but for "speed",
what that is made of (_made.py). With few queries it needs neither (_absorbed.py); statistics are computed again.
patch(memory="lean") gives every fourth block the policy lean, and the others minimal.

A call that leaves use_cache on gets its cache filled, as from transformers but without gradient; turn it off in
training to save that memory. With a cache that holds something it is a step of generation (_step.py). With attention
weights as output, with another cache or with a mask of the user's own, the stock layer runs; its attention function is
fastprompt's (hf_attention) where it can be.

Source: transformers T5LayerSelfAttention, T5LayerCrossAttention.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import EncoderDecoderCache

from fastprompt._allowed import Allowed
from fastprompt._bias_by_distance import dense_bias, table_of
from fastprompt._note import OTHER_BIAS, ROWS, note_on
from fastprompt.hf_attention import wants_weights
from fastprompt.modules import _absorbed, _projected
from fastprompt.modules._attend import Attend, Options
from fastprompt.modules._bias import bias_obstacle, bias_table
from fastprompt.modules._frozen import apply, rate
from fastprompt.modules._frozen_attention import CachedKeys, FrozenAttention
from fastprompt.modules._made import made_of
from fastprompt.modules._origin import leave_origin, origin_of
from fastprompt.modules._ready import head_obstacle, is_stock, obstacle, ready
from fastprompt.modules._step import step
from fastprompt.ops._dropout import new_seed


class FastAttention:
    """What the mixins for self- and cross-attention share."""

    kernel = "frozen_attention: rms_norm, t5_attention, dropout_add"
    attention_name: str
    _modules: dict[str, Any]
    layer_norm: Any
    fastprompt_memory: str
    # The layer that computes the stack's bias; in a tuple it is no child.
    fastprompt_bias: tuple[Any, ...] = ()

    @property
    def _attention(self) -> Any:
        """The T5Attention, looked up for less than nn.Module's own lookup takes."""
        return self._modules[self.attention_name]

    def _parts(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The modules whose weights it reads, and the others that it does not call."""
        attention, own = self._attention, self._modules
        children = {**{name: attention._modules[name] for name in "qkvo"}, "layer_norm": own["layer_norm"]}
        return children, {self.attention_name: attention, "dropout": own["dropout"]}

    def fastprompt_obstacle(self) -> str | None:
        return self._other_scores() or obstacle(*self._parts())

    def _other_scores(self, inputs: tuple[Tensor, ...] | None = None) -> str | None:
        """Why kernels do not compute its scores; None if they do."""
        attention = self._attention
        if not is_stock(type(attention)):
            return f"{self.attention_name} is a {type(attention).__name__}"
        return head_obstacle(attention)

    def fastprompt_saved(self, attended: bool) -> int | None:
        """Bytes per row; of cross-attention with few queries. attended: a served one precedes it in this block."""
        attention, memory = self._attention, self.fastprompt_memory
        x = 0 if attended and memory != "speed" else self.layer_norm.weight.nbytes
        out = attention.q.weight[:, 0].nbytes
        if memory == "minimal":
            return int(4 + x)
        if self.attention_name == "SelfAttention":
            projections = 3 * out if _projected.keeps_projections(memory, attention.is_decoder) else 0
            out = out if memory != "speed" or _projected.keeps_out(attention.q.weight) else 0
            return int(4 + x + out + 8 * attention.n_heads + projections)
        return None if memory == "speed" else int(4 + x + out)

    def _weights(
        self, allowed: Any, inputs: tuple[Tensor, ...], kwargs: dict[str, Any]
    ) -> dict[str, Tensor] | None:
        """Those of q, k, v, o and layer_norm, if the fused layer covers the call."""
        covers = (
            isinstance(allowed, Allowed)
            and not wants_weights(self._attention, kwargs)
            and self._other_scores(inputs) is None
        )
        return ready(*self._parts(), *inputs) if covers else None

    def _held(self, past: Any, S: int) -> int | Tensor | None:
        """The number of keys that a cache holds for this layer, which a static one counts on its device; None of a
        cache that the fused layers leave alone. S: the rows that the call brings keys of.
        """
        if past is None:
            return 0
        if not isinstance(past, EncoderDecoderCache):
            return None
        cache, layer = self._cache(past), self._attention.layer_idx
        length = cache.get_seq_length(layer)
        if cache.is_compileable:  # as long as it will be
            if self.attention_name == "SelfAttention":
                fits = isinstance(length, Tensor)  # the first call has a mask for that many keys
            else:
                fits = cache.layers[layer].max_cache_len == S  # free slots are attended to
            return length if fits and not torch.compiler.is_compiling() else None
        return length if isinstance(length, int) else None

    def _way(self, allowed: Allowed, past: Any, S: int) -> Callable[..., Tensor] | None:
        """How a call is computed: over a filled cache as a step of generation; None: by the stock layer."""
        held, own = self._held(past, S), self.attention_name == "SelfAttention"
        counted = isinstance(held, Tensor)  # its value would have to be waited for
        if held is None or (own and counted != isinstance(allowed.offset, Tensor)):
            return None
        if own and not counted and held != allowed.offset:
            return None
        updated = own or (past is not None and past.is_updated.get(self._attention.layer_idx))
        if not (updated if counted else held != 0):
            return self._run
        generates = (
            updated
            and not torch.is_grad_enabled()
            and not self._attention.training
            and rate(self._modules["dropout"]) == 0.0
            and not torch.compiler.is_compiling()
            and allowed.cu is None
        )
        return self._step if generates else None

    def _step(
        self,
        weights: dict[str, Tensor],
        x: Tensor,
        _states: Tensor | None,
        bias: Tensor | None,
        allowed: Allowed,
        past: Any,
    ) -> Tensor:
        attention = self._attention
        eps = self._modules["layer_norm"].variance_epsilon
        return step(weights, eps, attention.n_heads, attention.layer_idx, x, bias, allowed, past)

    def _cache(self, past: Any) -> Any:
        return (
            past.self_attention_cache
            if self.attention_name == "SelfAttention"
            else past.cross_attention_cache
        )

    def _run(
        self,
        weights: dict[str, Tensor],
        x: Tensor,
        states: Tensor | None,
        bias: Tensor | None,
        allowed: Allowed,
        past: Any,
    ) -> Tensor:
        a = self._attend(weights, x, states, bias, allowed, past)
        origin = origin_of(x, a.options.memory, self)  # type: ignore[arg-type]
        y, out, *keys_and_values = apply(FrozenAttention, x, a.states, a.prompt_k, a.prompt_v, a, origin)
        if past is not None:
            self._fill(past, y, keys_and_values, states is not None)
        if a.options.save:
            last = a.to_save()
            last = last if a.options.memory == "minimal" else last._replace(out=out)
            leave_origin(y, x, origin, last, self)  # type: ignore[arg-type]
        return y

    def _attend(
        self,
        weights: dict[str, Tensor],
        x: Tensor,
        states: Tensor | None,
        bias: Tensor | None,
        allowed: Allowed,
        past: Any,
    ) -> Attend:
        """All that the layer computes with in a call, its random numbers drawn."""
        attention, memory = self._attention, self.fastprompt_memory
        weight_p, outer_p = attention.dropout if attention.training else 0.0, rate(self._modules["dropout"])
        seeds = [new_seed(x.device) if p > 0.0 else None for p in (weight_p, outer_p)]
        prompt_k, prompt_v, prompt_ids, prompt_lens = allowed.prompt_of(attention.layer_idx)
        differentiable = any(t is not None and t.requires_grad for t in (x, states, prompt_k, prompt_v))
        save = torch.is_grad_enabled() and differentiable
        if save and states is not None and not torch.compiler.is_compiling() and states.is_inference():
            states = states.clone()  # autograd saves none of inference mode's
        T, K = x.shape[1], attention.key_value_proj_dim
        shared = prompt_ids is None and prompt_lens is None
        # A reentrant checkpoint runs without gradient first, and must then draw its second run's masks, which are of
        # another shape where keys are absorbed.
        recorded = save or weight_p > 0.0
        absorbed = states is not None and past is None and shared and _absorbed.pays(T, K, recorded)
        made = made_of(states) if memory != "speed" else None
        options = Options(
            eps=self._modules["layer_norm"].variance_epsilon,
            heads=attention.n_heads,
            causal=allowed.causal,
            weight_p=weight_p,
            outer_p=outer_p,
            memory=memory,
            save=save,
            absorbed=absorbed,
            made_eps=0.0 if made is None else made.eps,
            made_p=0.0 if made is None else made.p,
            rows=note_on(x, ROWS) if states is None else None,
        )
        return Attend(
            weights["layer_norm"],
            wq=weights["q"],
            wk=weights["k"],
            wv=weights["v"],
            wo=weights["o"],
            states=states,
            made_x=None if made is None else made.x,
            made_w=None if made is None else made.w,
            made_seed=None if made is None else made.seed,
            bias=bias,
            key_mask=allowed.mask,
            prompt_k=prompt_k,
            prompt_v=prompt_v,
            prompt_ids=prompt_ids,
            prompt_lens=prompt_lens,
            cu=allowed.cu,
            weight_seed=seeds[0],
            outer_seed=seeds[1],
            options=options,
            slot=[] if memory == "minimal" and not torch.compiler.is_compiling() else None,
        )

    def _fill(self, past: Any, y: Tensor, keys_and_values: list[Tensor], crosses: bool) -> None:
        """Leave keys and values [B, S, H, K] in the cache; crosses: of the encoder's output."""
        k, v = (each.transpose(1, 2) for each in keys_and_values)
        if y.requires_grad and not torch.compiler.is_compiling():
            k, v = CachedKeys.apply(y, k, v)
        layer = self._attention.layer_idx
        self._cache(past).update(k, v, layer)
        if crosses:
            past.is_updated[layer] = True


class FastSelfAttention(FastAttention):
    """Mixin for T5LayerSelfAttention."""

    attention_name = "SelfAttention"

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        position_bias: Tensor | None = None,
        past_key_values: Any = None,
        cache: Any = None,  # the same, from transformers 5.24 on
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, None]:
        past = past_key_values if cache is None else cache
        attention, bias = self._attention, position_bias
        weights = self._weights(attention_mask, (hidden_states,), kwargs)
        way = None if weights is None else self._way(attention_mask, past, hidden_states.shape[1])
        # Of a first layer without a bias, as where blocks have changed places, T5 hands on zeros.
        has_bias = bias is not None or attention.has_relative_attention_bias
        if way is not None and (has_bias or attention_mask.brings_bias()):
            if bias is None and attention.has_relative_attention_bias:
                bias = bias_table(attention)
            T, offset = hidden_states.shape[1], attention_mask.offset
            # A trained bias comes dense, of a layer that was put in after patching.
            if bias is None or bias.dim() == 2 or self._is_frozen_bias(bias, T, offset):
                table = bias
                if bias is not None:
                    table = table_of(bias, attention_mask, attention.layer_idx)
                y = way(weights, hidden_states, None, table, attention_mask, past)
                # The bias goes on to the next layers as the table that it is; but if it could train as transformers
                # hands it on, for the second run of a reentrant checkpoint of blocks will. Over a static cache, whose
                # offset is a tensor, nobody wants a gradient.
                if bias is not None and bias.dim() == 2 and isinstance(offset, int) and self._bias_trains():
                    bias = dense_bias(bias, T, offset + T, offset).to(y.dtype)
                return y, bias, None
        return super().forward(  # type: ignore[misc]
            hidden_states, attention_mask, position_bias, past, **kwargs
        )

    def _is_frozen_bias(self, bias: Tensor, T: int, offset: int | Tensor) -> bool:
        """Dense, without a gradient, a function of distance."""
        if isinstance(offset, Tensor) or bias.requires_grad or note_on(bias, OTHER_BIAS):
            return False
        return bias.shape == (1, self._attention.n_heads, T, offset + T)

    def _bias_trains(self) -> bool:
        (owner,) = self.fastprompt_bias
        weight = owner._modules["SelfAttention"]._modules["relative_attention_bias"].weight
        return bool(weight.requires_grad)

    def _other_scores(self, inputs: tuple[Tensor, ...] | None = None) -> str | None:
        for owner in self.fastprompt_bias:
            attention = owner._modules["SelfAttention"]
            if not is_stock(type(attention)):
                return f"its stack's bias is made by a {type(attention).__name__}"
            # Asked of the weight: reentrant checkpointing lets the bias itself require a gradient that nobody reads.
            found = bias_obstacle(attention, inputs)
            if found is not None:
                return found
        return super()._other_scores(inputs)

    def _weights(
        self, allowed: Any, inputs: tuple[Tensor, ...], kwargs: dict[str, Any]
    ) -> dict[str, Tensor] | None:
        return super()._weights(allowed, inputs, kwargs) if self.fastprompt_bias else None


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
        cache: Any = None,  # the same, from transformers 5.24 on
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, None]:
        past = past_key_values if cache is None else cache
        weights = self._weights(attention_mask, (hidden_states, key_value_states), kwargs)
        fits = weights is not None and attention_mask.fits(key_value_states.shape[1])
        served = fits and not attention_mask.causal and len(hidden_states) == len(key_value_states)
        way = self._way(attention_mask, past, key_value_states.shape[1]) if served else None
        if way is not None:
            y = way(weights, hidden_states, key_value_states, None, attention_mask, past)
            return y, position_bias, None
        return super().forward(  # type: ignore[misc]
            hidden_states, key_value_states, attention_mask, position_bias, past, **kwargs
        )

# SPDX-License-Identifier: Apache-2.0
"""A T5's stacks by CUDA graphs: the encoder's pass, and the decoder's, whole or for one token after the other.

transformers' generate runs as it is: it asks the two stacks, which replay graphs in place of their forward, and keeps
a cache, which is no more than a view of the decoder's keys and values. Those stay where the graphs read them. They have
room for 64 tokens at first, then for twice as many as before, with graphs of their own.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from math import prod
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, EncoderDecoderCache, GenerationMixin
from transformers.cache_utils import StaticLayer

from fastprompt._cache_name import CACHE, CACHE_NAMES
from fastprompt._generation import generation_option
from fastprompt._replayed import replayed
from fastprompt.graphs.places import Places, fixed
from fastprompt.graphs.recording import Pool, Recording
from fastprompt.hf_attention import SERVED, prompt_keys, prompts_in_force

ROOM = 64  # tokens


class Pass:
    """A stack's forward on calls like ``call``, of the encoder or of all the decoder's tokens at once, as a graph."""

    def __init__(
        self, forward: Callable[..., Any], stack: nn.Module, model: Any, call: dict[str, Any], pool: Pool
    ) -> None:
        self.places = Places()
        places = self.places.put(call)

        def run() -> Any:
            with prompt_keys(model, **places["prompts"]):
                return forward(**places["arguments"])

        self.recording = pool.record(stack, run, next(stack.parameters()).device)

    def __call__(self, call: dict[str, Any]) -> Any:
        """The stack's output, a tensor of its own."""
        self.places.put(call)
        found = self.recording.replay()
        return type(found)(last_hidden_state=found.last_hidden_state.clone())


class Decoding:
    """The decoder's forward on one sequence after the other of B rows, token by token, as graphs."""

    def __init__(
        self, forward: Callable[..., Any], model: Any, call: dict[str, Any], room: int, pool: Pool
    ) -> None:
        """``call``: the first one of a sequence."""
        self.forward, self.model, self.pool, self.room = forward, model, pool, room
        self.decoder, self.places = model.get_decoder(), Places()
        states: Tensor = call["arguments"]["encoder_hidden_states"]
        shapes, nbytes = self._shapes(self.decoder, states, room), self.nbytes(self.decoder, call, room)
        with torch.inference_mode(False):  # a sequence in that mode is followed by others
            flat = pool.storage(self, nbytes, states.device).view(states.dtype)
            own, cross = flat.split([prod(shape) for shape in shapes])
            self.own, self.cross = own.view(shapes[0]), cross.view(shapes[1])
            self.count = torch.zeros((), dtype=torch.int64, device=states.device)
        self.seen, self.is_released = 0, False  # seen: the value of count
        self._layers: list[Any] = [OwnKeys(keys, values, self.count) for keys, values in self.own]
        self._cross_layers: list[Any] = [CrossKeys(keys, values) for keys, values in self.cross]
        self.past = EncoderDecoderCache(Cache(layers=self._layers), Cache(layers=self._cross_layers))
        self._recorded: dict[Any, Recording] = {}

    @classmethod
    def nbytes(cls, decoder: Any, call: dict[str, Any], room: int) -> int:
        """Of the keys and values of tokens and of the encoder's rows."""
        states: Tensor = call["arguments"]["encoder_hidden_states"]
        return sum(map(prod, cls._shapes(decoder, states, room))) * states.dtype.itemsize

    @staticmethod
    def _shapes(decoder: Any, states: Tensor, room: int) -> list[tuple[int, ...]]:
        config, (B, S, _) = decoder.config, states.shape
        return [(len(decoder.block), 2, B, config.num_heads, length, config.d_kv) for length in (room, S)]

    def begin(self) -> None:
        """With no tokens: whatever the last sequence left, NaNs too, is gone."""
        self.own.zero_()
        self._go_to(0)

    def state(self) -> tuple[Tensor, Tensor, int]:
        """The keys and values of the tokens and of the encoder's rows, as copies, and the number of tokens."""
        return self.own.clone(), self.cross.clone(), self.seen

    def go_on(self, own: Tensor, cross: Tensor, seen: int) -> None:
        """From the state of one with less room."""
        self.begin()
        self.own[..., : own.shape[4], :] = own
        self.cross.copy_(cross)
        self._go_to(seen)

    def release(self) -> None:
        """Free the memory; it is not used again."""
        self.is_released = True
        self._recorded.clear()
        del self.own, self.cross, self.past, self._layers, self._cross_layers

    def _go_to(self, seen: int) -> None:
        self.seen = seen
        self.count.fill_(seen)

    def __call__(self, call: dict[str, Any], tokens: int) -> Any:
        """The decoder's output, a tensor of its own; its keys and values stay here."""
        first = self.seen == 0
        places = self.places.put(call)

        def run() -> Any:
            at = self.count + torch.arange(tokens, device=self.own.device) if tokens > 1 else self.count[None]
            for layer, (own, cross) in enumerate(zip(self._layers, self._cross_layers, strict=True)):
                own.at = at
                self.past.is_updated[layer] = cross.is_filled = not first
            with prompt_keys(self.model, **places["prompts"]):
                found = self.forward(**places["arguments"], **{CACHE: self.past})
            self.count.add_(tokens)
            return found

        # A start of several tokens is of any length, and comes once.
        found = run() if tokens > 1 else self._replay((first, fixed(call)), run)
        self.seen += tokens
        return type(found)(last_hidden_state=found.last_hidden_state.clone())

    def reorder(self, rows: Tensor) -> None:
        """Row b goes on from row ``rows[b]``, of the same example: what cross-attention reads is the same."""
        places = self.places.put({"rows": rows})
        self._replay(
            ("reorder", fixed(places)), lambda: self.own.copy_(self.own.index_select(2, places["rows"]))
        )

    def _replay(self, key: Any, run: Callable[[], Any]) -> Any:
        recording = self._recorded.get(key)
        if recording is None:
            own = self.own.clone()

            def before() -> None:
                self.own.copy_(own)
                self.count.fill_(self.seen)

            recording = self._recorded[key] = self.pool.record(self.decoder, run, self.own.device, before)
        return recording.replay()

    def cache(self) -> EncoderDecoderCache:
        """A copy of all that the decoder has seen, as one of transformers' own."""
        found = EncoderDecoderCache(DynamicCache(), DynamicCache())
        for layer, (own, cross) in enumerate(zip(self.own, self.cross, strict=True)):
            found.self_attention_cache.update(*own[..., : self.seen, :].clone(), layer)
            found.cross_attention_cache.update(*cross.clone(), layer)
            found.is_updated[layer] = True
        return found


class OwnKeys(StaticLayer):
    """A layer's keys and values [B, H, room, K] of the tokens, of which all layers count the same."""

    keys: Tensor
    values: Tensor
    at: Tensor  # int64 [T], where those of the tokens now computed go

    def __init__(self, keys: Tensor, values: Tensor, count: Tensor) -> None:
        super().__init__(max_cache_len=keys.shape[2])
        self.keys, self.values, self.cumulative_length = keys, values, count
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(2, self.at, key_states)
        self.values.index_copy_(2, self.at, value_states)
        return self.keys, self.values


class CrossKeys(StaticLayer):
    """Those [B, H, S, K] of the encoder's rows, which come at once."""

    keys: Tensor
    values: Tensor

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__(max_cache_len=keys.shape[2])
        self.keys, self.values = keys, values
        self.is_initialized, self.is_filled = True, False

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.keys.copy_(key_states)
        self.values.copy_(value_states)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.max_cache_len if self.is_filled else 0


class Sequences(EncoderDecoderCache):
    """What generate takes for its cache: how many tokens there are, and which rows go on."""

    def __init__(self) -> None:
        super().__init__(DynamicCache(), DynamicCache())
        self.decoding: Decoding | None = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0 if self.decoding is None else self.decoding.seen

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.decoding is not None:
            self.decoding.reorder(beam_idx)


@contextmanager
def by_graphs(
    model: Any, kept: Callable[[Any, Callable[[], Any]], Any], pool: Pool, whole: bool
) -> Iterator[Sequences]:
    """A ``with`` block in which the stacks of ``model`` replay graphs, for one call of generate over the given cache.

    ``kept(key, make)`` finds what was made under a key before. ``whole``: decoders without a cache, too; not in
    generate, where such a call has more tokens every time, as a logits processor's may.
    """
    encoder, decoder = model.get_encoder(), model.get_decoder()
    encode, decode = encoder.forward, decoder.forward
    past, thread, used = Sequences(), get_ident(), []

    def use(key: Any, make: Callable[[], Any]) -> Any:
        found = kept(key, make)
        used.append(found)
        return found

    def passed(name: str, stack: Any, forward: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        call = {"arguments": arguments, "prompts": prompts_in_force(stack.config)}
        found: Pass = use((name, fixed(call)), lambda: Pass(forward, stack, model, call, pool))
        return found(call)

    def is_ours(stack: Any, args: tuple[Any, ...], arguments: dict[str, Any]) -> bool:
        return not args and get_ident() == thread and _is_recordable(stack, arguments)

    @wraps(encode)
    def encoded(*args: Any, **arguments: Any) -> Any:
        if not is_ours(encoder, args, arguments):
            return encode(*args, **arguments)
        return passed("encoder", encoder, encode, arguments)

    @wraps(decode)
    def decoded(*args: Any, **arguments: Any) -> Any:
        if arguments.get(CACHE) is not past:
            alone = arguments.get(CACHE) is None and arguments.get("use_cache") is False
            if not (whole and alone and is_ours(decoder, args, arguments)):
                return decode(*args, **arguments)
            return passed("whole decoder", decoder, decode, arguments)
        del arguments[CACHE]
        call = {"arguments": arguments, "prompts": prompts_in_force(decoder.config)}
        (rows, tokens), states = arguments["input_ids"].shape, arguments["encoder_hidden_states"]

        def decoding(room: int) -> Decoding:
            like = {**call, "arguments": {**arguments, "input_ids": rows}}
            pool.reserve(Decoding.nbytes(decoder, call, room), states.device)
            return use(
                ("decoder", room, pool.epoch, fixed(like)), lambda: Decoding(decode, model, call, room, pool)
            )

        if past.decoding is None:
            past.decoding = decoding(_room(tokens))
            past.decoding.begin()
        elif past.decoding.seen + tokens > past.decoding.room:
            state = past.decoding.state()
            past.decoding = decoding(_room(past.decoding.seen + tokens))
            past.decoding.go_on(*state)
        found = past.decoding(call, tokens)
        setattr(found, CACHE, past)
        return found

    try:
        with replayed(encoder, encoded), replayed(decoder, decoded):
            yield past
    finally:
        for each in used:
            each.places.forget()


def _room(tokens: int) -> int:
    """A power of two times ROOM."""
    return ROOM << max(0, ((tokens - 1) // ROOM).bit_length())


def generator_of(model: Any) -> Any:
    """The transformers model whose generate a call of ``model.generate`` ends in; None: not one with T5's stacks."""
    found = model if isinstance(model, GenerationMixin) else getattr(model, "model", None)
    if not isinstance(found, GenerationMixin):
        return None
    config: Any = getattr(found, "config", None)
    return found if getattr(config, "model_type", None) in SERVED else None


def can_replay(model: Any) -> bool:
    """Can graphs be what the stacks' calls are, as things are now?"""
    called = model, model.get_encoder(), model.get_decoder()
    return (
        not model.training
        and is_on_one_gpu(model)
        and not torch.is_autocast_enabled("cuda")
        and not torch.compiler.is_compiling()
        # accelerate's forward may switch autocast on; torch's compiled calls know of no other forward
        and not any("forward" in vars(each) or each._compiled_call_impl is not None for each in called)
    )


def is_token_by_token(model: Any, kwargs: dict[str, Any]) -> bool:
    """Does generate with these keywords ask for one token after the other, over a cache that it makes itself?"""
    given = any(kwargs.get(name) is not None for name in _REFUSED)
    wanted = any(generation_option(model, kwargs, name, False) for name in _OPTIONS)
    return not given and not wanted and bool(generation_option(model, kwargs, "use_cache", True))


def is_on_one_gpu(model: nn.Module) -> bool:
    devices = {parameter.device for parameter in model.parameters()}
    return len(devices) == 1 and devices.pop().type == "cuda"


# Keywords of generate, and what its configuration may say, too
_REFUSED = (
    *CACHE_NAMES,
    "adapter_names",
    "assistant_model",
    "custom_generate",
    "decoder_attention_mask",
    "decoder_inputs_embeds",
)
_OPTIONS = ("cache_implementation", "prompt_lookup_num_tokens", "output_attentions", "output_hidden_states")


def _is_recordable(stack: Any, arguments: dict[str, Any]) -> bool:
    """Packed rows have a graph per layout; layers' states and weights, and gradients, are no output of a graph."""
    allowed, flags = arguments.get("attention_mask"), ("output_attentions", "output_hidden_states")
    return (
        not any(arguments.get(name, getattr(stack.config, name, False)) for name in flags)
        and getattr(allowed, "cu", None) is None
        and arguments.get("return_dict") is not False
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cuda")
    )

# SPDX-License-Identifier: Apache-2.0
"""What generate, rank and encode replay: graphs of the two stacks, in place of their forward; on a CPU the decoder's.

transformers' generate runs as it is, and keeps a cache, which is no more than a view of the decoder's keys and values.
Those have room for 64 tokens at first, then for twice as many as before, with graphs of their own.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache, GenerationMixin

from fastprompt._cache_name import CACHE, CACHE_NAMES
from fastprompt._extra_outputs import OUTPUT_FLAGS, extra_output
from fastprompt._family import SERVED
from fastprompt._generation import generation_option
from fastprompt._replayed import replayed, settle
from fastprompt._stamp import State
from fastprompt.dispatch.plain import is_plain_call
from fastprompt.graphs.places import signature
from fastprompt.graphs.recording import Pool
from fastprompt.graphs.stacks import Decoding, Pass
from fastprompt.hf_attention import NAME, prompts_in_force

ROOM = 64  # tokens


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


class _Call:
    """One call of generate, rank or encode: what the stacks run in place of their ``forward``."""

    def __init__(
        self, model: Any, kept: Callable[[Any, Callable[[], Any]], Any], pool: Pool, whole: bool, on_gpu: bool
    ) -> None:
        self.model, self.kept, self.pool, self.whole, self.on_gpu = model, kept, pool, whole, on_gpu
        self.encoder, self.decoder = model.get_encoder(), model.get_decoder()
        self.past, self.thread = Sequences(), get_ident()
        self.used: list[Pass | Decoding] = []

    def encode(self, forward: Callable[..., Any], *args: Any, **arguments: Any) -> Any:
        if not self._may_record(self.encoder, args, arguments):
            return forward(*args, **arguments)
        return self._at_once("encoder", self.encoder, forward, arguments)

    def decode(self, forward: Callable[..., Any], *args: Any, **arguments: Any) -> Any:
        cache = arguments.get(CACHE)
        if cache is self.past:
            del arguments[CACHE]
            found = self._token_by_token(forward, arguments)
            setattr(found, CACHE, self.past)
            return found
        alone = self.whole and cache is None and arguments.get("use_cache") is False
        if not (alone and self._may_record(self.decoder, args, arguments)):
            return forward(*args, **arguments)
        return self._at_once("whole decoder", self.decoder, forward, arguments)

    def _may_record(self, stack: Any, args: tuple[Any, ...], arguments: dict[str, Any]) -> bool:
        return not args and get_ident() == self.thread and _is_recordable(stack, arguments)

    def _at_once(self, name: str, stack: Any, forward: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        call = {"arguments": arguments, "prompts": prompts_in_force(stack.config)}
        key = name, signature(call)
        found: Pass = self._use(key, lambda: Pass(forward, stack, self.model, call, self.pool))
        return found(call)

    def _token_by_token(self, forward: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        call = {"arguments": arguments, "prompts": prompts_in_force(self.decoder.config)}
        tokens, past = arguments["input_ids"].shape[1], self.past
        if past.decoding is None:
            past.decoding = self._decoding(forward, call, _room(tokens))
            past.decoding.begin()
        elif past.decoding.seen + tokens > past.decoding.room:
            state = past.decoding.state()
            past.decoding = self._decoding(forward, call, _room(past.decoding.seen + tokens))
            past.decoding.go_on(*state)
        return past.decoding(call, tokens)

    def _decoding(self, forward: Callable[..., Any], call: dict[str, Any], room: int) -> Decoding:
        arguments = call["arguments"]
        rows, states = len(arguments["input_ids"]), arguments["encoder_hidden_states"]
        like = {**call, "arguments": {**arguments, "input_ids": rows}}
        self.pool.reserve(Decoding.nbytes(self.decoder, states, room), states.device)
        # A tape of prompts that lie elsewhere takes another's place, and keeps no prompts that are gone.
        key = "decoder", room, self.pool.epoch, signature(like, addresses=self.on_gpu)
        made: Decoding = self._use(
            key, lambda: Decoding(forward, self.model, call, room, self.pool, self.on_gpu)
        )
        return made

    def _use(self, key: Any, make: Callable[[], Any]) -> Any:
        found = self.kept(key, make)
        self.used.append(found)
        return found


@contextmanager
def by_graphs(
    model: Any, kept: Callable[[Any, Callable[[], Any]], Any], pool: Pool, whole: bool, on_gpu: bool
) -> Iterator[Sequences]:
    """A ``with`` block in which the stacks of ``model`` replay graphs, for one call of generate over the given cache.

    ``kept(key, make)`` finds what was made under a key before. ``whole``: decoders without a cache, too; not in
    generate, where such a call has more tokens every time, as a logits processor's may. On a CPU whole passes, the
    encoder's too, are the model's own: the host has little part in their time, and they would keep all they compute.
    """
    call = _Call(model, kept, pool, whole, on_gpu)
    encoded = replayed(call.encoder, call.encode) if on_gpu else nullcontext()
    try:
        with encoded, replayed(call.decoder, call.decode):
            yield call.past
    finally:
        for each in call.used:
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


def can_replay(model: Any, device: torch.device, whole: bool, on_gpu: bool) -> bool:
    """Can graphs be what the stacks' calls are, as things are now? ``whole``: for passes of all tokens at once."""
    called = model, model.get_encoder(), model.get_decoder()
    for stack in called[1:]:
        settle(stack)
    return (
        not model.training
        and _counts_from_zero(called[2])
        and (on_gpu or (not whole and _attends_by_fastprompt(model.get_decoder()) and is_plain_call()))
        and not torch.is_autocast_enabled(device.type)
        and not torch.compiler.is_compiling()
        # accelerate's forward may switch autocast on; torch's compiled calls know of no other forward
        and not any("forward" in vars(each) or each._compiled_call_impl is not None for each in called)
    )


def _counts_from_zero(decoder: Any) -> bool:
    """Does each block keep its keys at its own place in a cache? Not where one before it was taken out."""
    return all(block.layer[0].SelfAttention.layer_idx == i for i, block in enumerate(decoder.block))


def is_token_by_token(model: Any, kwargs: dict[str, Any]) -> bool:
    """Does generate with these keywords ask for one token after the other, over a cache that it makes itself?"""
    given = any(kwargs.get(name) is not None for name in _REFUSED)
    wanted = any(generation_option(model, kwargs, name, False) for name in _OPTIONS)
    return not given and not wanted and bool(generation_option(model, kwargs, "use_cache", True))


def device_of(state: State) -> torch.device | None:
    """Where its parameters are, if that is one GPU or a CPU."""
    devices = {each.device for each in state.tensors if isinstance(each, nn.Parameter)}
    found = devices.pop() if len(devices) == 1 else None
    return found if found is not None and found.type in ("cpu", "cuda") else None


def _attends_by_fastprompt(decoder: Any) -> bool:
    """Does our attention run in it? On a CPU transformers' looks what a mask holds, and does not keep to its memory."""
    return bool(decoder.config._attn_implementation_internal == NAME)


# Keywords of generate, and what its configuration may say, too
_REFUSED = (
    *CACHE_NAMES,
    "adapter_names",
    "assistant_model",
    "custom_generate",
    "decoder_attention_mask",
    "decoder_inputs_embeds",
)
_OPTIONS = ("cache_implementation", "prompt_lookup_num_tokens", *OUTPUT_FLAGS)


def _is_recordable(stack: Any, arguments: dict[str, Any]) -> bool:
    """Packed rows have a graph per layout; layers' states and weights, and gradients, are no output of a graph."""
    return (
        extra_output(arguments, stack.config) is None
        and getattr(arguments.get("attention_mask"), "cu", None) is None
        and arguments.get("return_dict") is not False
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled(next(stack.parameters()).device.type)
    )

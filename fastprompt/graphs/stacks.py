# SPDX-License-Identifier: Apache-2.0
"""The forward of a T5's stacks as graphs: a whole pass, and a decoder's for one token after the other."""

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, EncoderDecoderCache

from fastprompt._cache_name import CACHE
from fastprompt.graphs.keys import CrossKeys, OwnKeys
from fastprompt.graphs.places import Places, signature
from fastprompt.graphs.recording import Pool, Recording
from fastprompt.graphs.tape import Tape
from fastprompt.hf_attention import prompt_keys

CPU_ROWS = 64  # the most of a step that a CPU records: with more the host has little part in its time


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
    """The decoder's forward on one sequence after the other of B rows, token by token, as graphs.

    On a CPU all but the first token is a graph, if the rows are few: with many the host has little part in the time,
    and a tape keeps all that a step computes.
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        model: Any,
        call: dict[str, Any],
        room: int,
        pool: Pool,
        on_gpu: bool,
    ) -> None:
        """``call``: the first one of a sequence."""
        self.forward, self.model, self.pool, self.room, self.on_gpu = forward, model, pool, room, on_gpu
        self.decoder, self.places = model.get_decoder(), Places()
        states: Tensor = call["arguments"]["encoder_hidden_states"]
        shapes, nbytes = self._shapes(self.decoder, states, room), self.nbytes(self.decoder, states, room)
        with torch.inference_mode(False):  # a sequence in that mode is followed by others
            flat = pool.storage(self, nbytes).view(states.dtype)
            own, cross = flat.split([prod(shape) for shape in shapes])
            self.own, self.cross = own.view(shapes[0]), cross.view(shapes[1])
            self.count = torch.zeros((), dtype=torch.int64, device=states.device)
        self.seen, self.is_released = 0, False  # seen: the value of count
        self._layers: list[Any] = [OwnKeys(keys, values, self.count) for keys, values in self.own]
        self._cross_layers: list[Any] = [CrossKeys(keys, values) for keys, values in self.cross]
        self.past = EncoderDecoderCache(Cache(layers=self._layers), Cache(layers=self._cross_layers))
        self._recorded: dict[Any, Recording | Tape | None] = {}  # None: it cannot be; of tapes the last one

    @classmethod
    def nbytes(cls, decoder: Any, states: Tensor, room: int) -> int:
        """Of the keys and values of tokens and of the encoder's rows ``states``, which the pool has to reserve."""
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
        passes = tokens > 1 or (not self.on_gpu and (first or self.own.shape[2] > CPU_ROWS))
        found = run() if passes else self._replay((first, signature(call)), run)
        self.seen += tokens
        return type(found)(last_hidden_state=found.last_hidden_state.clone())

    def reorder(self, rows: Tensor) -> None:
        """Row b goes on from row ``rows[b]``, of the same example: what cross-attention reads is the same."""
        if not self.on_gpu:
            held = self.own[..., : self.seen, :]
            held.copy_(held.index_select(2, rows))
            return
        places = self.places.put({"rows": rows})
        self._replay(
            ("reorder", signature(places)), lambda: self.own.copy_(self.own.index_select(2, places["rows"]))
        )

    def _replay(self, key: Any, run: Callable[[], Any]) -> Any:
        if key not in self._recorded:
            if not self.on_gpu:
                return self._first_run(key, run)
            own = self.own.clone()

            def before() -> None:
                self.own.copy_(own)
                self.count.fill_(self.seen)

            self._recorded[key] = self.pool.record(self.decoder, run, self.own.device, before)
        recording = self._recorded[key]
        return run() if recording is None else recording.replay()

    def _first_run(self, key: Any, run: Callable[[], Any]) -> Any:
        """On a CPU, where recording is a run like any other. What was recorded before had kept prompts elsewhere."""
        tape = Tape(run)
        self._recorded.clear()
        self._recorded[key] = None if tape.obstacle else tape
        return tape.result

    def cache(self) -> EncoderDecoderCache:
        """A copy of all that the decoder has seen, as one of transformers' own."""
        found = EncoderDecoderCache(DynamicCache(), DynamicCache())
        for layer, (own, cross) in enumerate(zip(self.own, self.cross, strict=True)):
            found.self_attention_cache.update(*own[..., : self.seen, :].clone(), layer)
            found.cross_attention_cache.update(*cross.clone(), layer)
            found.is_updated[layer] = True
        return found

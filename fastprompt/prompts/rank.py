# SPDX-License-Identifier: Apache-2.0
"""Rank classification: the answer is the choice that the model finds most likely.

The encoder runs once for all choices, and so do the decoder's first position and its keys and values of the encoder's
output: what is left per choice is its own tokens. It is differentiable. Where no cache carries gradients, the decoder
runs on each choice as a whole.
"""

import operator
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache

from fastprompt._cache_name import CACHE, cache_of
from fastprompt._replayed import is_replayed
from fastprompt.modules.attention import FastAttention
from fastprompt.ops._indices import indices
from fastprompt.prompts.bank import Names

Choices = Sequence[str] | Sequence[Sequence[int]]

ROWS_PER_PASS = 64  # decoder rows at a time; the encoder's output is repeated for so many


class Ranking(NamedTuple):
    """What ``PromptModel.rank`` returns.

    scores: [B, C] float, in nats: log-probability of each choice, or its mean per token.
    best: [B] int64, the choice with the highest score; of equals, the first.
    """

    scores: Tensor
    best: Tensor


def choice_ids(choices: Choices, tokenizer: Any, vocab_size: int) -> list[list[int]]:
    """The token ids of each choice: a string's as the tokenizer makes them for a target, with its end marker.

    Raises:
        TypeError, ValueError: choices that are neither strings nor lists of ids, none at all, an empty one, an id
            outside the vocabulary, or strings without a tokenizer.
    """
    if isinstance(choices, str) or not isinstance(choices, Sequence) or not choices:
        raise ValueError(
            f"PromptModel: choices must be a list of one or more strings or id lists, got {choices!r}"
        )
    strings = [choice for choice in choices if isinstance(choice, str)]
    if strings and len(strings) != len(choices):
        raise TypeError("PromptModel: choices must be all strings or all lists of token ids, got both")
    if strings and tokenizer is None:
        raise ValueError(
            "PromptModel: choices of text need a tokenizer. Pass it to PromptModel, or give token ids"
        )
    found = [_token_ids(ids) for ids in (tokenizer(strings).input_ids if strings else choices)]
    for choice, ids in zip(choices, found, strict=True):
        if not ids or not all(0 <= token < vocab_size for token in ids):
            raise ValueError(
                f"PromptModel: a choice must be one or more token ids in [0, {vocab_size}), got {choice!r} with {ids}"
            )
    return found


def _token_ids(choice: Any) -> list[int]:
    """NumPy's and PyTorch's integers as Python's; nothing of what is no list of integers."""
    with suppress(TypeError):
        values = choice.tolist() if isinstance(choice, Tensor) else list(choice)
        return [-1 if isinstance(token, bool) else operator.index(token) for token in values]
    return []


def rank_of(scores: Tensor) -> Ranking:
    """The ranking by scores [B, C]."""
    return Ranking(scores, first_best(scores))


def first_best(scores: Tensor) -> Tensor:
    """[..., C] -> [...]: the index of the highest; of equals, the first."""
    # argmax may return any of several equal scores; a stable sort keeps the first one first.
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., 0]


def choice_scores(
    model: Any,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    choices: Sequence[Sequence[int]],
    *,
    prompts: Names = None,
    length_normalized: bool = False,
    encoder_outputs: Any = None,
    cache: Any = None,
) -> Tensor:
    """Log-probability of each choice given each row's input: [B, C], in nats, fp32 or the model's wider dtype.

    Args:
        model: a PromptModel, or a T5ForConditionalGeneration.
        input_ids, attention_mask: [B, S], as the model's forward takes them.
        choices: the token ids of C targets.
        prompts: as in PromptModel.forward; None for a bare T5.
        length_normalized: the mean per token instead of the sum.
        encoder_outputs: of these inputs, if they are known.
        cache: an EncoderDecoderCache with their keys and values in cross-attention, if they are known.

    Raises:
        ValueError: gradient checkpointing is on in training mode, a choice has several tokens, and gradients are off,
            before transformers 5.24.
    """
    scorer = _Scorer(model, input_ids, attention_mask, prompts, encoder_outputs)
    at_once = max(1, ROWS_PER_PASS // len(scorer.hidden))
    learns = torch.is_grad_enabled() and not scorer.cache_carries_gradients()
    # A graph gives no cache away. For choices of one token nobody wants one.
    replays = scorer.is_replayed() and any(len(choice) > 1 for choice in choices)
    if cache is None and (learns or replays):
        scores = torch.cat([scorer.whole(some) for some in pieces(choices, at_once)], 1)
    else:
        first, cache = scorer.first(any(len(choice) > 1 for choice in choices), cache)
        columns = list(first[:, indices([choice[0] for choice in choices], first.device)].unbind(1))
        longer = [number for number, choice in enumerate(choices) if len(choice) > 1]
        for numbers in pieces(longer, at_once):
            rest = scorer.rest(cache, [choices[number] for number in numbers])
            for number, each in zip(numbers, rest.unbind(1), strict=True):
                columns[number] = columns[number] + each
        scores = torch.stack(columns, 1)
    return (
        scores / indices([len(choice) for choice in choices], scores.device) if length_normalized else scores
    )


def pieces(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """``size`` at a time, the last perhaps fewer."""
    return (items[first : first + size] for first in range(0, len(items), size))


def sequence_scores(logits: Tensor, targets: Tensor) -> Tensor:
    """[B]: the sum of the log-probabilities that logits [B, T, V] give targets [B, T], without those that are -100."""
    chosen = _log_softmax(logits).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return chosen.where(targets >= 0, 0).sum(1)


class _Scorer:
    """A model on one batch of inputs, encoded once."""

    def __init__(
        self, model: Any, input_ids: Tensor | None, mask: Tensor | None, prompts: Names, encoder_outputs: Any
    ) -> None:
        self.model, self.mask = model, mask
        prompted = hasattr(model, "encode")  # a PromptModel; this module is below it
        self.names = prompts
        self.more: dict[str, Any] = {"prompts": prompts} if prompted else {}
        if encoder_outputs is None and prompted:
            encoder_outputs = model.encode(input_ids, mask, prompts=prompts)
        elif encoder_outputs is None:
            encoder_outputs = model.get_encoder()(input_ids=input_ids, attention_mask=mask, return_dict=True)
        self.hidden = encoder_outputs[0]

    def first(self, keep: bool, cache: Any) -> tuple[Tensor, Any]:
        """Log-probabilities [B, V] of the first token, and the cache behind it."""
        start = self.hidden.new_full((len(self.hidden), 1), self._start(), dtype=torch.int64)
        output = self.model(
            encoder_outputs=(self.hidden,),
            attention_mask=self.mask,
            decoder_input_ids=start,
            use_cache=keep,
            **{CACHE: cache},
            **self.more,
        )
        found = cache_of(output)
        if keep and found is None:
            raise ValueError(
                "choice_scores: with gradient checkpointing T5 keeps no cache in training mode, and choices of several "
                "tokens need one. Call gradient_checkpointing_disable()"
            )
        return _log_softmax(output.logits[:, 0]), found

    def rest(self, cache: Any, choices: Sequence[Sequence[int]]) -> Tensor:
        """[B, c]: what the tokens after the first add to the scores of c choices of two or more tokens."""
        repeated = _repeated_cache(cache, len(choices))
        return self._scores(choices, use_cache=True, **{CACHE: repeated})

    def cache_carries_gradients(self) -> bool:
        """Patched attention's does not, and needs no keys for a whole target; under checkpointing there is none."""
        return not any(
            isinstance(module, FastAttention)
            or (getattr(module, "gradient_checkpointing", False) and module.training)
            for module in self._decoder().modules()
        )

    def is_replayed(self) -> bool:
        return is_replayed(self._decoder())

    def _decoder(self) -> Any:
        return getattr(self.model, "model", self.model).get_decoder()

    def whole(self, choices: Sequence[Sequence[int]]) -> Tensor:
        """[B, c]: the scores of c choices, without a cache."""
        return self._scores([[self._start(), *choice] for choice in choices], use_cache=False)

    def _scores(self, choices: Sequence[Sequence[int]], **how: Any) -> Tensor:
        """[B, c]: of the tokens after the first, each choice behind each row's input."""
        B, c = len(self.hidden), len(choices)
        tokens = [indices(choice, self.hidden.device) for choice in choices]
        pad = nn.utils.rnn.pad_sequence
        given = pad([each[:-1] for each in tokens], batch_first=True).repeat(B, 1)
        wanted = pad([each[1:] for each in tokens], batch_first=True, padding_value=-100).repeat(B, 1)
        more = dict(self.more)
        if not isinstance(self.names, str | None):
            more["prompts"] = [name for name in self.names for _ in range(c)]
        output = self.model(
            encoder_outputs=(_repeated(self.hidden, c),),
            attention_mask=None if self.mask is None else _repeated(self.mask, c),
            decoder_input_ids=given,
            **how,
            **more,
        )
        return sequence_scores(output.logits, wanted).view(B, c)

    def _start(self) -> int:
        config = self.model.config
        start = getattr(config, "decoder_start_token_id", None)
        return int(config.pad_token_id if start is None else start)


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def _repeated(tensor: Tensor, times: int) -> Tensor:
    """Row b becomes the rows b * times to (b + 1) * times - 1."""
    return tensor if times == 1 else tensor.repeat_interleave(times, 0)


def _repeated_cache(cache: Any, times: int) -> EncoderDecoderCache:
    """A cache of its own, so that the next choices find the given one as it was."""
    parts = []
    for part in (cache.self_attention_cache, cache.cross_attention_cache):
        own = DynamicCache()
        for number, each in enumerate(part.layers):
            # Where a block was taken out of the decoder there are none: the others keep their numbers.
            if each.keys is not None:
                own.update(_repeated(each.keys, times), _repeated(each.values, times), number)
        parts.append(own)
    return EncoderDecoderCache(*parts)

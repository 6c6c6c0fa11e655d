# SPDX-License-Identifier: Apache-2.0
"""Token ids in, padded batches out."""

import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .task import Example

Pair = tuple[list[int], list[int]]
"""(encoder input ids, decoder target ids) of one example, without padding."""

Batch = dict[str, Tensor]
"""`input_ids`, `attention_mask` int64 [B, S] and `labels` int64 [B, T], -100 past a target's end."""


def collate(pairs: Sequence[Pair], pad: int = 0) -> Batch:
    """Pads pairs on the right, to the longest of them."""

    def padded(rows: list[list[int]], value: int) -> Tensor:
        tensors = [torch.tensor(row) for row in rows]
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)

    input_ids = padded([source for source, _ in pairs], pad)
    mask = padded([[1] * len(source) for source, _ in pairs], 0)
    return {
        "input_ids": input_ids,
        "attention_mask": mask,
        "labels": padded([target for _, target in pairs], -100),
    }


def encode(examples: Sequence[Example], tokenizer: Any, max_tokens: int) -> list[Pair]:
    """Texts, cut to `max_tokens` ids with the end marker, and their labels, as token ids."""
    sources = tokenizer([example.text for example in examples], truncation=True, max_length=max_tokens)
    targets = encode_labels([example.label for example in examples], tokenizer)
    return list(zip(sources["input_ids"], targets, strict=True))


def encode_labels(labels: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Labels as token ids, without the end marker: labels are ranked, not generated, so nothing has to stop."""
    return tokenizer(list(labels), add_special_tokens=False)["input_ids"]


def shuffled(pairs: Sequence[Pair], batch_size: int, seed: int) -> Iterator[Batch]:
    """Endless full batches; every epoch sees each example at most once, in a new order."""
    rng = random.Random(seed)
    while True:
        order = rng.sample(pairs, len(pairs))
        for start in range(0, len(order) - batch_size + 1, batch_size):
            yield collate(order[start : start + batch_size])


def in_order(pairs: Sequence[Pair], batch_size: int) -> Iterator[Batch]:
    """One pass over all pairs; the last batch may be smaller."""
    for start in range(0, len(pairs), batch_size):
        yield collate(pairs[start : start + batch_size])

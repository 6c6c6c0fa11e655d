# SPDX-License-Identifier: Apache-2.0
"""Token ids in, padded batches out."""

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fastprompt.training.examples import Example

Pair = tuple[list[int], list[int]]
"""(encoder input ids, decoder target ids) of one example, without padding."""

Batch = dict[str, Tensor]
"""`input_ids`, `attention_mask` int64 [B, S] and `labels` int64 [B, T], -100 past a target's end."""


def encode(
    examples: Sequence[Example], tokenizer: Any, *, max_input: int = 512, max_target: int | None = None
) -> list[Pair]:
    """Examples as token ids.

    Args:
        examples: may be none.
        tokenizer: the model's.
        max_input: tokens that an input is cut to, its end marker among them.
        max_target: the most tokens of a target, without its end marker; None: any number.

    Returns:
        A pair per example, in their order, both parts with the end marker.

    Raises:
        ValueError: a limit is less than 1, or a target is over ``max_target``: a part would be learned as the whole.
    """
    for name, limit in (("max_input", max_input), ("max_target", max_target)):
        if limit is not None and limit < 1:
            raise ValueError(f"encode: {name} must be 1 or more, got {limit}")
    if not examples:
        return []
    sources = tokenizer([each.input for each in examples], truncation=True, max_length=max_input)["input_ids"]
    targets = tokenizer([each.target for each in examples])["input_ids"]
    if max_target is not None and (long := lengths_over(targets, tokenizer, max_target)):
        raise ValueError(
            f"encode: {len(long):,} of {len(targets):,} targets have more than max_target={max_target} tokens, up to "
            f"{max(long):,}. Allow as many, or leave those out"
        )
    return list(zip(sources, targets, strict=True))


def lengths_over(targets: Sequence[Sequence[int]], tokenizer: Any, limit: int) -> list[int]:
    """The targets' lengths that are over the limit.

    The end marker does not count: an answer that is generated up to the limit may lack it.
    """
    lengths = [len(target) - (list(target[-1:]) == [tokenizer.eos_token_id]) for target in targets]
    return [length for length in lengths if length > limit]


def collate(pairs: Sequence[Pair]) -> Batch:
    """Pairs as a batch, padded on the right to the longest input and the longest target.

    Args:
        pairs: B of them, one or more. Inputs are padded with 0, which the mask hides, targets with -100.

    Returns:
        A Batch on the CPU: ``input_ids`` and ``attention_mask`` (1 at tokens, 0 at padding) int64 [B, S], ``labels``
        int64 [B, T].
    """

    def padded(rows: list[list[int]], value: int) -> Tensor:
        tensors = [torch.tensor(row, dtype=torch.int64) for row in rows]
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)

    return {
        "input_ids": padded([source for source, _ in pairs], 0),
        "attention_mask": padded([[1] * len(source) for source, _ in pairs], 0),
        "labels": padded([target for _, target in pairs], -100),
    }


def shuffled(pairs: Sequence[Pair], batch_size: int, seed: int) -> Iterator[Batch]:
    """Endless full batches; every epoch sees each example at most once, in a new order.

    Fewer examples than ``batch_size`` are one batch. ValueError: there are none, or ``batch_size`` is less than 1.
    """
    size = min(batch_size, len(pairs))
    if size < 1:
        raise ValueError(
            f"shuffled: needs an example and a batch_size of 1 or more, got {len(pairs)} and {batch_size}"
        )
    return _shuffled(pairs, size, random.Random(seed))


def _shuffled(pairs: Sequence[Pair], size: int, rng: random.Random) -> Iterator[Batch]:
    while True:
        order = rng.sample(pairs, len(pairs))
        for start in range(0, len(order) - size + 1, size):
            yield collate(order[start : start + size])


def in_order(pairs: Sequence[Pair], batch_size: int) -> Iterator[Batch]:
    """One pass over all pairs; the last batch may be smaller. ValueError: ``batch_size`` is less than 1."""
    if batch_size < 1:
        raise ValueError(f"in_order: batch_size must be 1 or more, got {batch_size}")
    return (collate(pairs[start : start + batch_size]) for start in range(0, len(pairs), batch_size))


def split(batch: Batch, rows: int) -> list[Batch]:
    """The batch, `rows` of it at a time, each piece cut to its own longest input and target."""
    return [
        _cut({name: each[start : start + rows] for name, each in batch.items()})
        for start in range(0, len(batch["labels"]), rows)
    ]


def _cut(batch: Batch) -> Batch:
    inputs, targets = _width(batch["attention_mask"] != 0), _width(batch["labels"] != -100)
    widths = {"input_ids": inputs, "attention_mask": inputs, "labels": targets}
    # T5 takes a view of its labels, which must be contiguous for that.
    return {name: batch[name][:, :width].contiguous() for name, width in widths.items()}


def _width(filled: Tensor) -> int:
    """Columns of bool [B, S] up to the last with a True, at least one."""
    columns = filled.any(0).nonzero()
    return int(columns[-1]) + 1 if len(columns) else 1


def to_few_lengths(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch, padded on to a multiple of 32 input and 8 target tokens: each length has a CUDA graph of its own."""
    found, fill = dict(batch), {"input_ids": (32, 0), "attention_mask": (32, 0), "labels": (8, -100)}
    # Nothing of what is padded now is attended to.
    if found.get("attention_mask") is None and "input_ids" in found:
        found["attention_mask"] = torch.ones_like(found["input_ids"])
    for name, (multiple, value) in fill.items():
        if name in found:
            found[name] = functional.pad(found[name], (0, -found[name].shape[1] % multiple), value=value)
    return found


def to_device(device: torch.device, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch with its tensors there; other values, such as prompts' names, as they are."""
    return {
        name: each.to(device, non_blocking=True) if isinstance(each, Tensor) else each
        for name, each in batch.items()
    }

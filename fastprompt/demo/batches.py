# SPDX-License-Identifier: Apache-2.0
"""The task's examples as token ids."""

from collections.abc import Sequence
from typing import Any

from fastprompt.training.batches import Pair

from .task import Example


def encode(examples: Sequence[Example], tokenizer: Any, max_tokens: int) -> list[Pair]:
    """Texts, cut to `max_tokens` ids with the end marker, and their labels, as token ids."""
    sources = tokenizer([example.text for example in examples], truncation=True, max_length=max_tokens)
    targets = encode_labels([example.label for example in examples], tokenizer)
    return list(zip(sources["input_ids"], targets, strict=True))


def encode_labels(labels: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Labels as token ids, without the end marker: labels are ranked, not generated, so nothing has to stop."""
    return tokenizer(list(labels), add_special_tokens=False)["input_ids"]

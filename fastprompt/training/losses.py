# SPDX-License-Identifier: Apache-2.0
"""What a step makes small."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastprompt.graphs import Graphed
from fastprompt.prompts.rank import choice_scores
from fastprompt.training.batches import Batch, on, to_few_lengths


@dataclass(frozen=True)
class Loss:
    """A function of a batch: its `mean` over something, a scalar with a gradient, of which a batch has `items`."""

    mean: Callable[[Batch], Tensor]
    items: Callable[[Batch], int]

    def __call__(self, batch: Batch) -> Tensor:
        return self.mean(batch)


def model_loss(prompted: Any, *, prompts: str | None = None) -> Loss:
    """The paper's: the target's likelihood, in nats per token, with the prompt of that name (None: the first one). It
    leaves out the logits. A batch may have ``prompts`` of its own, a name per row.

    Of ``fastprompt.graphed(prompted)`` a step is a CUDA graph, on a GPU, and batches are padded to few lengths for it;
    those that name prompts of their own run without.
    """

    def mean(batch: Batch) -> Tensor:
        model, on_gpu = of_graphed(prompted)
        there = on(model.device, {"prompts": prompts} | batch)
        if on_gpu and "prompts" not in batch:
            return prompted(**to_few_lengths(there), return_logits=False)
        return model(**there, return_logits=False).loss

    return Loss(mean, lambda batch: int((batch["labels"] != -100).sum()))


def of_graphed(model: Any) -> tuple[Any, bool]:
    """The model itself, and whether graphs are what runs it."""
    if not isinstance(model, Graphed):
        return model, False
    return model.model, model.model.device.type == "cuda"


def choice_loss(model: Any, choices: Sequence[Sequence[int]], *, prompts: str | None = None) -> Loss:
    """The choice of each row's own target among `choices`, in nats per row: what a rank asks, made smooth.

    A small model would spend the paper's loss on making the choices likely at all. `choices` are token ids, ended by
    the end marker if, and only if, the targets are; `prompts` a PromptModel's, one name (None: the first prompt) unless
    a batch has ``prompts`` of its own, a name per row. TypeError: they are strings. ValueError: there are none, one is
    empty, two are the same, or a target is none of them.
    """
    if any(isinstance(choice, str) or not isinstance(choice, Sequence) for choice in choices):
        raise TypeError(
            f"choice_loss: choices must be lists of token ids, got {choices!r}. Give tokenizer(choices).input_ids"
        )
    if not all(map(len, (choices, *choices))):
        raise ValueError(
            f"choice_loss: choices must be one or more lists of one or more token ids, got {choices!r}. Give "
            "tokenizer(choices).input_ids"
        )
    check_choices(choices)

    def loss(batch: Batch) -> Tensor:
        own = own_choice(batch, choices)
        there = on(model.device, batch)
        names = there.get("prompts", prompts)
        scores = choice_scores(model, there["input_ids"], there["attention_mask"], choices, prompts=names)
        return torch.nn.functional.cross_entropy(scores, own.to(scores.device))

    return Loss(loss, lambda batch: len(batch["labels"]))


def check_choices(choices: Sequence[Sequence[int]]) -> None:
    """ValueError: two choices are the same to the model."""
    first: dict[tuple[int, ...], int] = {}
    for number, choice in enumerate(map(tuple, choices)):
        if first.setdefault(choice, number) != number:
            raise ValueError(
                f"choices {first[choice]} and {number} are the same tokens, {list(choice)}: the model cannot tell them "
                "apart. Give each once, in words that the tokenizer knows"
            )


def own_choice(batch: Batch, choices: Sequence[Sequence[int]]) -> Tensor:
    """Which of `choices` each row's target is: int64 [B]."""
    index = {tuple(choice): number for number, choice in enumerate(choices)}
    targets = [tuple(token for token in row if token != -100) for row in batch["labels"].tolist()]
    if strange := [target for target in targets if target not in index]:
        raise ValueError(f"choice_loss: targets must be among the choices {list(index)}, got {strange[0]}")
    return torch.tensor([index[target] for target in targets])

# SPDX-License-Identifier: Apache-2.0
"""The losses that a step makes smaller."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastprompt.graphs import Graphed
from fastprompt.prompts.rank import choice_scores
from fastprompt.training.batches import Batch, to_device, to_few_lengths


@dataclass(frozen=True)
class Loss:
    """Of a batch: `mean(batch)`, a scalar with a gradient, is its loss; `items(batch)` is how many it is a mean of."""

    mean: Callable[[Batch], Tensor]
    items: Callable[[Batch], int]

    def __call__(self, batch: Batch) -> Tensor:
        return self.mean(batch)


def model_loss(prompted: Any, *, prompts: str | None = None) -> Loss:
    """The paper's loss: the cross-entropy of the targets' tokens.

    Args:
        prompted: a PromptModel, or one ``graphed``: on a GPU a step is then a CUDA graph, and batches are padded to few
            lengths for it; those with ``prompts`` of their own run without.
        prompts: the name of the prompt; None: the first. A batch's own ``prompts``, a name per row, come first.

    Returns:
        A Loss: the mean over the batch's target tokens (labels other than -100), 0-d, in nats, of the dtype that the
        model's own loss has. A call of it raises what the model's forward does.
    """

    def mean(batch: Batch) -> Tensor:
        model, on_gpu = of_graphed(prompted)
        there = to_device(model.device, {"prompts": prompts} | batch)
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
    """Cross-entropy of each row's own target among ``choices``, by the scores that ``rank`` uses.

    For models so small that the paper's loss would be spent on making the choices likely at all.

    Args:
        model: a PromptModel, or a T5ForConditionalGeneration.
        choices: C lists of token ids, with the end marker if and only if the targets have it.
        prompts: a PromptModel's, one name; None: the first. A batch's own ``prompts``, a name per row, come first.

    Returns:
        A Loss: the mean over the rows, 0-d, in nats, fp32 or the model's wider dtype.

    Raises:
        TypeError: a choice is a string, or no list.
        ValueError: there is no choice, one is empty, two are the same; in a call, a target is none of them.
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
    check_choices("choice_loss", choices)

    def loss(batch: Batch) -> Tensor:
        own = own_choice(batch, choices)
        there = to_device(model.device, batch)
        names = there.get("prompts", prompts)
        scores = choice_scores(model, there["input_ids"], there["attention_mask"], choices, prompts=names)
        return torch.nn.functional.cross_entropy(scores, own.to(scores.device))

    return Loss(loss, lambda batch: len(batch["labels"]))


def check_choices(what: str, choices: Sequence[Sequence[int]]) -> None:
    """ValueError, which begins with ``what``: two choices are the same to the model."""
    first: dict[tuple[int, ...], int] = {}
    for number, choice in enumerate(map(tuple, choices)):
        if first.setdefault(choice, number) != number:
            raise ValueError(
                f"{what}: choices {first[choice]} and {number} are the same tokens, {list(choice)}: the model cannot "
                "tell them apart. Give each once, in words that the tokenizer knows"
            )


def own_choice(batch: Batch, choices: Sequence[Sequence[int]]) -> Tensor:
    """Which of `choices` each row's target is: int64 [B]."""
    index = {tuple(choice): number for number, choice in enumerate(choices)}
    targets = [tuple(token for token in row if token != -100) for row in batch["labels"].tolist()]
    if strange := [target for target in targets if target not in index]:
        raise ValueError(f"choice_loss: targets must be among the choices {list(index)}, got {strange[0]}")
    return torch.tensor([index[target] for target in targets])

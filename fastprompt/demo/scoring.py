# SPDX-License-Identifier: Apache-2.0
"""Rank classification: the predicted class is the label word that the model finds most likely.

The rule needs no prompt, so a frozen model with and without one are measured alike, and neither can lose by
answering with a word that is no label.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from fastprompt._evaluating import evaluating
from fastprompt.prompts.rank import choice_scores, first_best
from fastprompt.training.batches import Batch
from fastprompt.training.losses import own_choice


@torch.no_grad()
def accuracy(model: nn.Module, batches: Iterable[Batch], labels: Sequence[Sequence[int]]) -> float:
    """The share of rows, in [0, 1], whose own label ranks first among `labels`. The model is in eval mode meanwhile.

    `model` is a T5ForConditionalGeneration or a PromptModel; `labels` holds the token ids of the label strings, without
    the end marker that `training.evaluate` gives them.
    """
    right = total = 0
    with evaluating(model):
        for batch in batches:
            own = own_choice(batch, labels)
            scores = choice_scores(model, batch["input_ids"], batch["attention_mask"], labels)
            right += int((first_best(scores) == own).sum())
            total += len(own)
    return right / total

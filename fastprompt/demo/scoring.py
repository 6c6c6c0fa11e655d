# SPDX-License-Identifier: Apache-2.0
"""Rank classification: the predicted class is the label word that the model finds most likely.

The rule needs no prompt, so a frozen model with and without one are measured alike, and neither can lose by
answering with a word that is no label.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from fastprompt.prompts.rank import choice_scores
from fastprompt.training.batches import Batch
from fastprompt.training.losses import own_choice


def label_scores(model: nn.Module, batch: Batch, labels: Sequence[Sequence[int]]) -> Tensor:
    """Log-likelihood of each label given each row's input: fp32 [B, C], in nats.

    `model` is a T5ForConditionalGeneration or a PromptModel; `labels` holds the token ids of C label strings.
    """
    return choice_scores(model, batch["input_ids"], batch["attention_mask"], labels)


@torch.no_grad()
def accuracy(model: nn.Module, batches: Iterable[Batch], labels: Sequence[Sequence[int]]) -> float:
    """The share of rows, in [0, 1], whose own label ranks first among `labels`. The model is in eval mode meanwhile."""
    was_training = model.training
    model.eval()
    right = total = 0
    for batch in batches:
        best = label_scores(model, batch, labels).argmax(1)
        right += int((best == own_choice(batch, labels)).sum())
        total += len(best)
    model.train(was_training)
    return right / total

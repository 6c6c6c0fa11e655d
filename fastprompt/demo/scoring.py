# SPDX-License-Identifier: Apache-2.0
"""Rank classification: the predicted class is the label word that the model finds most likely.

The rule needs no prompt, so a frozen model with and without one are measured alike, and neither can lose by
answering with a word that is no label.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from .batches import Batch


@torch.no_grad()
def label_scores(model: nn.Module, batch: Batch, labels: Sequence[Sequence[int]]) -> Tensor:
    """Log-likelihood of each label given each row's input: fp32 [B, C], in nats.

    `model` is a T5ForConditionalGeneration or a PromptModel; `labels` holds the token ids of C label strings.
    The encoder runs once.
    """
    rows, encoder_outputs, scores = len(batch["input_ids"]), None, []
    for label in labels:
        target = torch.tensor([label]).repeat(rows, 1)
        inputs = (
            {"input_ids": batch["input_ids"]}
            if encoder_outputs is None
            else {"encoder_outputs": encoder_outputs}
        )
        output = model(attention_mask=batch["attention_mask"], labels=target, **inputs)
        encoder_outputs = (output.encoder_last_hidden_state,)
        log_probabilities = output.logits.float().log_softmax(-1)
        scores.append(log_probabilities.gather(-1, target[..., None]).sum((1, 2)))
    return torch.stack(scores, dim=1)


def accuracy(model: nn.Module, batches: Iterable[Batch], labels: Sequence[Sequence[int]]) -> float:
    """The share of rows, in [0, 1], whose own label ranks first among `labels`. The model is in eval mode meanwhile."""
    was_training = model.training
    model.eval()
    right = total = 0
    for batch in batches:
        best = label_scores(model, batch, labels).argmax(1).tolist()
        own = [[token for token in row if token != -100] for row in batch["labels"].tolist()]
        right += sum(list(labels[choice]) == target for choice, target in zip(best, own, strict=True))
        total += len(best)
    model.train(was_training)
    return right / total

# SPDX-License-Identifier: Apache-2.0
"""Learning the prompt: the recipe of Lester et al. 2021 in small, around the training loop."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastprompt import PromptConfig, PromptModel, training
from fastprompt.training.batches import Pair, in_order, shuffled
from fastprompt.training.loop import Curve

from .scoring import accuracy

INSTRUCTION = "topic:"  # the tiny T5 knows it from its pretraining; the prompt starts from it and does better


@dataclass(frozen=True)
class Recipe:
    """How the prompt is learned. It begins as the instruction, over and over; the learning rate is constant."""

    num_tokens: int = 20
    kind: str = "prepend"
    parameterization: str | None = None
    steps: int = 800
    batch_size: int = 32
    lr: float = 0.2
    max_tokens: int = 48
    dev_every: int = 100
    seed: int = 0


def new_prompt(model: PreTrainedModel, tokenizer: Any, recipe: Recipe) -> PromptModel:
    """`model`, frozen, and a prompt that says INSTRUCTION until its rows are full; a prefix begins as a cached one."""
    rows = PromptConfig(
        recipe.num_tokens, init="text", text=" ".join([INSTRUCTION] * recipe.num_tokens), seed=recipe.seed
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*the last have no row")
        if recipe.kind != "prefix":
            return PromptModel(model, replace(rows, kind=recipe.kind), tokenizer=tokenizer)
        prefix = PromptConfig(
            recipe.num_tokens,
            "prefix",
            init="prompt",
            source="start",
            parameterization=recipe.parameterization,
            seed=recipe.seed,
        )
        prompted = PromptModel(model, {"start": rows, "default": prefix}, tokenizer=tokenizer)
    prompted.remove_prompt("start")
    return prompted


def optimizer_for(parameters: Sequence[Tensor], recipe: Recipe) -> torch.optim.Optimizer:
    """Adam without decay, in place of the paper's unfactored Adafactor: the two agree but for momentum and clipping."""
    return torch.optim.Adam(parameters, lr=recipe.lr)


def tune(
    prompted: PromptModel,
    train: Sequence[Pair],
    dev: Sequence[Pair],
    labels: Sequence[Sequence[int]],
    recipe: Recipe,
) -> Curve:
    """Trains the prompt in place and leaves it as it was where its accuracy on dev was best; the curve's scores are it.

    The loss is the choice among the labels: a model this small would spend the paper's, the label's likelihood among
    all words of the vocabulary, on making the labels likely at all.

    `train`, `dev`: encoded examples; `labels`: the token ids of each class's word.
    """
    parameters = [each for each in prompted.prompts.parameters() if each.requires_grad]
    return training.tune(
        prompted,
        shuffled(train, recipe.batch_size, recipe.seed),
        training.choice_loss(prompted, labels),
        optimizer_for(parameters, recipe),
        recipe.steps,
        score=lambda: accuracy(prompted, in_order(dev, 64), labels),
        score_every=recipe.dev_every,
    )

# SPDX-License-Identifier: Apache-2.0
"""Learning the prompt: the recipe of Lester et al. 2021 in small, with stock PyTorch around `PromptModel`."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from fastprompt import PromptConfig, PromptModel

from .batches import Pair, in_order, shuffled
from .scoring import accuracy, choice_loss

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


@dataclass
class Curve:
    """What training saw: the loss of every step (nats per document) and, by step, the accuracy on dev."""

    losses: list[float] = field(default_factory=list)
    dev_accuracy: dict[int, float] = field(default_factory=dict)
    best_step: int = 0


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
    """Trains the prompt in place and leaves it as it was where its accuracy on dev was best (paper, section 3).

    The loss is the choice among the labels: a model this small would spend the paper's, the label's likelihood among
    all words of the vocabulary, on making the labels likely at all.

    `train`, `dev`: encoded examples; `labels`: the token ids of each class's word.
    """
    parameters = [each for each in prompted.prompts.parameters() if each.requires_grad]
    optimizer = optimizer_for(parameters, recipe)
    batches = shuffled(train, recipe.batch_size, recipe.seed)
    curve, best = Curve(), [each.detach().clone() for each in parameters]
    prompted.train()
    with tqdm(total=recipe.steps, desc="tuning the prompt", unit="step", ncols=79) as bar:
        for step in range(1, recipe.steps + 1):
            loss = choice_loss(prompted, next(batches), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.losses.append(loss.item())
            if step % recipe.dev_every == 0 or step == recipe.steps:
                curve.dev_accuracy[step] = accuracy(prompted, in_order(dev, 64), labels)
                if curve.dev_accuracy[step] > curve.dev_accuracy.get(curve.best_step, -1.0):
                    curve.best_step, best = step, [each.detach().clone() for each in parameters]
                bar.set_postfix_str(
                    f"loss {loss.item():.2f}, dev {curve.dev_accuracy[step]:.0%}", refresh=False
                )
            bar.update()
    with torch.no_grad():
        for parameter, value in zip(parameters, best, strict=True):
            parameter.copy_(value)
    prompted.eval()
    return curve

# SPDX-License-Identifier: Apache-2.0
"""Side by side: stock Hugging Face with PEFT and fastprompt take the same steps on the same batches."""

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import nn

from fastprompt import PromptModel
from fastprompt.training.batches import Batch

WARM_UP = 2  # first steps, not timed: they allocate


@dataclass(frozen=True)
class Race:
    """Median milliseconds per training step of each, and the largest absolute difference of their losses."""

    steps: int
    peft_ms: float
    fastprompt_ms: float
    largest_loss_difference: float


def race(
    prompted: PromptModel,
    batches: Iterator[Batch],
    new_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    steps: int,
) -> Race | None:
    """Trains a copy of `prompted` and a PEFT model from the same prompt for `steps` steps; None without peft.

    The steps alternate, so that a busy machine slows both alike. `prompted` itself is left as it is.
    """
    if find_spec("peft") is None:
        return None
    from peft import PromptTuningConfig, get_peft_model

    ours = copy.deepcopy(prompted)
    prompt = ours.prompts["default"]
    config = PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=len(prompt))
    stock = get_peft_model(copy.deepcopy(prompted.model), config)
    [stock_prompt] = [parameter for parameter in stock.parameters() if parameter.requires_grad]
    with torch.no_grad():
        # PEFT keeps a second, unused half for the decoder.
        stock_prompt[: len(prompt)].copy_(prompt)
    runners = [
        (stock.train(), new_optimizer([stock_prompt])),
        (ours.train(), new_optimizer([prompt])),
    ]
    seconds: tuple[list[float], list[float]] = ([], [])
    largest = 0.0
    for _ in range(steps + WARM_UP):
        batch, losses = next(batches), []
        for (model, optimizer), times in zip(runners, seconds, strict=True):
            began = time.perf_counter()
            loss = model(**batch).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            times.append(time.perf_counter() - began)
            losses.append(loss.item())
        largest = max(largest, abs(losses[0] - losses[1]))
    peft_ms, fastprompt_ms = (1000 * statistics.median(times[WARM_UP:]) for times in seconds)
    return Race(steps, peft_ms, fastprompt_ms, largest)

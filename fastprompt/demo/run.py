# SPDX-License-Identifier: Apache-2.0
"""The demo from start to end: load, measure the frozen model, tune, measure again, compare, report."""

import argparse
import copy
import platform
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
from transformers.utils import logging

from fastprompt import PromptModel
from fastprompt.commands._model import positive
from fastprompt.commands._outputs import check_outputs
from fastprompt.training.batches import in_order, shuffled
from fastprompt.training.loop import Curve

from .batches import encode, encode_labels
from .race import Race, race
from .report import table, write_json, write_plot
from .scoring import accuracy
from .task import AREAS, Example, load_task
from .tune import INSTRUCTION, Recipe, new_prompt, tune

TINY_T5 = Path(__file__).parent / "tiny_t5"
RACE_STEPS = 20


def plain_sgd(parameters: Sequence[torch.Tensor]) -> torch.optim.Optimizer:
    """For the side by side. Adam would blow rounding up: it takes full steps along gradients that are next to zero."""
    return torch.optim.SGD(parameters, lr=0.1)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo with a command line's arguments, without its name. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="fastprompt demo", description="Learns a soft prompt for a tiny frozen T5 on real text, offline."
    )
    add_arguments(parser)
    return run(parser.parse_args(argv))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    recipe = Recipe()
    parser.add_argument("--out", type=Path, default=Path("fastprompt-demo"), help="folder for the results")
    parser.add_argument(
        "--steps", type=positive, default=recipe.steps, help="training steps (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=recipe.seed, help="of the prompt and the order of examples"
    )


def run(options: argparse.Namespace) -> int:
    """Writes `prompt.safetensors`, `results.json` and `loss.png`. Returns the exit status."""
    recipe = Recipe(steps=options.steps, seed=options.seed)
    check_outputs(
        options.out / "prompt.safetensors", [options.out / "results.json", options.out / "loss.png"], []
    )
    began = time.perf_counter()

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(TINY_T5)
    # Stored in float16 for its size, computed in float32.
    model = AutoModelForSeq2SeqLM.from_pretrained(TINY_T5, dtype=torch.float32).eval()
    task = load_task()
    encoded = {split: encode(examples, tokenizer, recipe.max_tokens) for split, examples in task.items()}
    labels = encode_labels(list(AREAS), tokenizer)
    sizes = ", ".join(f"{len(examples)} {split}" for split, examples in task.items())
    print(f"areas: {', '.join(AREAS)}")
    print(f"documents, split by module: {sizes}")

    frozen = accuracy(model, in_order(encoded["test"], 64), labels)
    words = tokenizer(INSTRUCTION, add_special_tokens=False)["input_ids"]
    told = [([*words, *source], target) for source, target in encoded["test"]]
    instructed = accuracy(model, in_order(told, 64), labels)
    prompted = new_prompt(model, tokenizer, recipe)
    untrained = copy.deepcopy(prompted)
    curve = tune(prompted, encoded["train"], encoded["dev"], labels, recipe)
    tuned = accuracy(prompted, in_order(encoded["test"], 64), labels)
    beside_peft = race(
        untrained,
        shuffled(encoded["train"], recipe.batch_size, recipe.seed),
        plain_sgd,
        min(RACE_STEPS, recipe.steps),
    )

    accuracies = {"frozen": frozen, "instructed": instructed, "prompt": tuned}
    results = _results(recipe, task, prompted, accuracies, curve, beside_peft, time.perf_counter() - began)
    prompted.save_prompt("default", options.out / "prompt.safetensors")
    write_json(options.out / "results.json", results)
    written = ["prompt.safetensors", "results.json"]
    if write_plot(options.out / "loss.png", curve):
        written.append("loss.png")
    else:
        print("no loss curve: matplotlib is not installed (pip install matplotlib)")
    print(f"\n{table(results)}\n")
    print(f"{results['seconds']:.0f} s; {', '.join(written)} in {options.out}")
    return 0


def _results(
    recipe: Recipe,
    task: dict[str, list[Example]],
    prompted: PromptModel,
    accuracies: dict[str, float],
    curve: Curve,
    beside_peft: Race | None,
    seconds: float,
) -> dict[str, Any]:
    """What `results.json` holds."""
    areas = Counter(example.label for example in task["test"])
    return {
        "labels": list(AREAS),
        "documents": {split: len(examples) for split, examples in task.items()},
        "test_accuracy": {"majority": max(areas.values()) / areas.total(), **accuracies},
        "parameters": {
            "trained": prompted.num_trainable_parameters,
            "model": sum(parameter.numel() for parameter in prompted.model.parameters()),
        },
        "race": beside_peft and asdict(beside_peft),
        "recipe": asdict(recipe),
        "curve": asdict(curve),
        "seconds": seconds,
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }

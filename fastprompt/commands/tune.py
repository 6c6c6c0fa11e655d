# SPDX-License-Identifier: Apache-2.0
"""`fastprompt tune`."""

import argparse
import json
import sys
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from fastprompt import PromptConfig, PromptModel, patch, training
from fastprompt.commands._model import (
    add_example_arguments,
    add_graph_argument,
    add_model_arguments,
    graphed_if_served,
    load,
    positive,
    read_file,
    too_long,
    warn_of_long,
    warn_of_unknown,
)
from fastprompt.commands._outputs import check_outputs, make_folder, real
from fastprompt.graphs import Graphed
from fastprompt.patching import MEMORY
from fastprompt.prompts import read_prompt
from fastprompt.prompts.config import INITS, KINDS
from fastprompt.prompts.rank import choice_ids
from fastprompt.training.batches import Pair, collate
from fastprompt.training.losses import check_choices

TOLD_INITS = tuple(init for init in INITS if init not in ("array", "file", "prompt"))  # those need a source
HELP = "learn a prompt from examples"
EPILOG = """
A file of examples has a JSON object per line, {"input": "a gripping film", "target": "positive"}, or ends in .csv or
.tsv and is a table under a line of names. With --dev, the prompt is kept at the step that answers most of its examples
right, and written as often as it gets better.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The recipe, whose defaults are the paper's."""
    parser.epilog = EPILOG
    add_model_arguments(parser)
    add_graph_argument(parser)
    parser.add_argument(
        "--train", required=True, type=Path, metavar="FILE", help="the examples to learn from"
    )
    parser.add_argument("--dev", type=Path, metavar="FILE", help="examples that choose the best step")
    parser.add_argument(
        "--out", required=True, type=Path, metavar="FILE", help="the prompt: .safetensors or .npy"
    )
    parser.add_argument("--log", type=Path, metavar="FILE", help="losses and scores, as JSON")
    add_example_arguments(parser)
    prompt = parser.add_argument_group("prompt")
    prompt.add_argument("--kind", choices=KINDS, help="(default: prepend)")
    prompt.add_argument("--num-tokens", type=positive, help="its rows (default: 100)")
    prompt.add_argument(
        "--init",
        choices=TOLD_INITS,
        help="where its rows begin (default: labels, where there are --choices; else vocab)",
    )
    prompt.add_argument("--text", help="for --init text")
    prompt.add_argument("--start", type=Path, metavar="PROMPT", help="a prompt file to go on from, instead")
    prompt.add_argument("--task", type=int, help="which prompt of --start, a PEFT multitask adapter")
    recipe = parser.add_argument_group("recipe")
    recipe.add_argument(
        "--loss",
        choices=("target", "choice"),
        default="target",
        help="the likelihood of the target, as in the paper, or its choice among --choices, for small models",
    )
    recipe.add_argument("--steps", type=positive, default=30_000, help="(default: %(default)s)")
    recipe.add_argument("--batch-size", type=positive, default=32, help="(default: %(default)s)")
    recipe.add_argument(
        "--micro-batch",
        type=positive,
        help="rows at once, also of --dev, where memory is short: the step stays the batch's",
    )
    recipe.add_argument("--lr", type=float, help="constant (default: 0.3, the paper's; for a prefix 0.01)")
    recipe.add_argument("--weight-decay", type=float, default=1e-5, help="per step (default: %(default)s)")
    recipe.add_argument("--dev-every", type=positive, default=1000, help="steps (default: %(default)s)")
    recipe.add_argument("--seed", type=int, default=0, help="of the prompt, the order and dropout")
    recipe.add_argument(
        "--memory",
        choices=MEMORY,
        default="balanced",
        help="what is kept for backward (default: %(default)s)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Learn the prompt and write it."""
    _check(arguments)
    train = read_file(arguments, arguments.train)
    dev = read_file(arguments, arguments.dev) if arguments.dev else []
    goes_on = arguments.start and real(arguments.start) == real(arguments.out)
    inputs = [arguments.train, arguments.dev, None if goes_on else arguments.start, Path(arguments.model)]
    check_outputs(arguments.out, [arguments.log], inputs)
    model, tokenizer = load(arguments)
    choices = choice_ids(arguments.choices, tokenizer, model.config.vocab_size) if arguments.choices else []
    check_choices("--choices", choices)
    pairs = _encoded(arguments, train, dev, tokenizer)
    patch(model, memory=arguments.memory, lm_loss=True)
    torch.manual_seed(arguments.seed)
    prompted = _prompted(arguments, model, tokenizer)
    step = graphed_if_served(arguments, prompted)
    loss = _loss(arguments, prompted, step, choices, pairs)
    curve, existed = training.Curve(), arguments.out.exists()
    _say(f"{len(train):,} examples, {prompted.num_trainable_parameters:,} trained parameters")
    try:
        training.tune(
            prompted,
            training.shuffled(pairs, arguments.batch_size, arguments.seed),
            loss,
            training.Adafactor(
                prompted.prompts.parameters(),
                lr=_rate(arguments, prompted),
                weight_decay=arguments.weight_decay,
            ),
            arguments.steps,
            micro_batch=arguments.micro_batch,
            score=partial(_score, arguments, step, dev, tokenizer) if dev else None,
            score_every=arguments.dev_every,
            on_score=partial(_on_score, arguments, prompted, curve),
            curve=curve,
        )
    except KeyboardInterrupt:
        return _interrupted(arguments, prompted, curve, bool(dev and existed))
    else:
        prompted.save_prompt("default", arguments.out)
    finally:
        _log(arguments, curve)
    _say(f"the prompt of step {curve.best_step:,} is in {arguments.out}")
    return 0


def _loss(
    arguments: argparse.Namespace,
    prompted: PromptModel,
    step: PromptModel | Graphed,
    choices: list[list[int]],
    pairs: list[Pair],
) -> training.Loss:
    """Of a batch; where graphs run its steps, that of the longest is recorded."""
    if arguments.loss == "choice":
        return training.choice_loss(prompted, choices)
    loss = training.model_loss(step)
    if isinstance(step, Graphed):
        _record_longest(prompted, loss, pairs, arguments.micro_batch or arguments.batch_size)
    return loss


def _interrupted(
    arguments: argparse.Namespace, prompted: PromptModel, curve: training.Curve, replaces: bool
) -> int:
    """What Ctrl-C leaves -> the exit status.

    A file that was there gives way to what a step has learned and, with --dev, a score has chosen.
    """
    told = f"nothing is written to {arguments.out}"
    if curve.best_step and (not replaces or curve.best_step in curve.scores):
        prompted.save_prompt("default", arguments.out)
        told = f"the prompt of step {curve.best_step:,} is in {arguments.out}"
    print(f"interrupted; {told}", file=sys.stderr)
    return 130


def _encoded(
    arguments: argparse.Namespace,
    train: list[training.Example],
    dev: list[training.Example],
    tokenizer: Any,
) -> list[Pair]:
    """The pairs to learn from. ValueError: a target is longer than --max-target. Warns of others that no answer is."""
    pairs = training.encode(train, tokenizer, max_input=arguments.max_input)
    learned = [target for _, target in pairs]
    if said := too_long(learned, tokenizer, arguments.max_target):
        raise ValueError(f"{arguments.train}: {said}. Allow as many, or leave those out")
    wanted = tokenizer([each.target for each in dev])["input_ids"] if dev else []
    if not arguments.choices:
        warn_of_long(arguments.dev, wanted, tokenizer, arguments.max_target)
    warn_of_unknown([*learned, *wanted], tokenizer)
    return pairs


def _record_longest(prompted: PromptModel, loss: training.Loss, pairs: list[Pair], rows: int) -> None:
    """Record the graph of the longest possible batch first: those of shorter ones then fit into its memory."""
    longest = max((each for each, _ in pairs), key=len), max((each for _, each in pairs), key=len)
    gpus = [prompted.device] if prompted.device.type == "cuda" else []
    with torch.random.fork_rng(gpus):  # the steps to come draw as they would
        prompted.train()
        loss(collate([longest] * min(rows, len(pairs))))


def _score(arguments: argparse.Namespace, step: Any, dev: list[training.Example], tokenizer: Any) -> float:
    # No right answer has more tokens: each stands for a byte or more, but for those that mark begin and end.
    most = max(len(each.target.encode()) for each in dev) + 2
    return training.evaluate(
        step,
        dev,
        tokenizer,
        choices=arguments.choices,
        batch_size=arguments.micro_batch or 64,
        max_input=arguments.max_input,
        max_new_tokens=min(arguments.max_target, most),
    ).score


def _on_score(
    arguments: argparse.Namespace,
    prompted: PromptModel,
    curve: training.Curve,
    step: int,
    value: float,
    best: bool,
) -> None:
    if best and step:
        prompted.save_prompt("default", arguments.out)
    if arguments.log and (arguments.log.is_file() or not arguments.log.exists()):  # a pipe takes one document
        _log(arguments, curve)
    _say(f"dev after step {step:,}: {value:.1%} right{', kept' if best else ''}")


def _log(arguments: argparse.Namespace, curve: training.Curve) -> None:
    if not arguments.log:
        return
    try:
        make_folder(arguments.log)
        arguments.log.write_text(json.dumps(asdict(curve)) + "\n", encoding="utf-8")
    except OSError as error:  # what is learned is worth more than its log
        print(f"--log: {error}", file=sys.stderr)


def _say(text: str) -> None:
    with suppress(BrokenPipeError):  # nobody reads on, as behind `head`
        tqdm.write(text)
        sys.stdout.flush()


def _rate(arguments: argparse.Namespace, prompted: PromptModel) -> float:
    """The learning rate asked for, or its kind's."""
    if arguments.lr is not None:
        return arguments.lr
    return 0.01 if prompted.kind("default") == "prefix" else 0.3


def _check(arguments: argparse.Namespace) -> None:
    """ValueError: a slip that shows before the model is loaded."""
    for option, source in (("loss choice", "choices"), ("init labels", "choices"), ("init text", "text")):
        name, value = option.split()
        if getattr(arguments, name) == value and not getattr(arguments, source):
            raise ValueError(f"--{option} needs --{source}, which it reads")
    for name in ("lr", "weight_decay"):
        value = getattr(arguments, name)
        if value is not None and not 0.0 <= value <= torch.finfo(torch.float32).max:
            raise ValueError(f"--{name.replace('_', '-')} must be a finite float32 of 0 or more, got {value}")
    if not 0 <= arguments.seed < 2**32:
        raise ValueError(f"--seed must be from 0 to {2**32 - 1}, got {arguments.seed}")
    if arguments.task is not None and not arguments.start:
        raise ValueError("--task needs --start, of whose prompts it is one")
    if arguments.start:
        for name in ("kind", "num_tokens", "init", "text"):
            if getattr(arguments, name) is not None:
                raise ValueError(f"--{name.replace('_', '-')} is the --start prompt's. Leave it out")
        kind = read_prompt(arguments.start, task=arguments.task).kind
    else:
        kind = _config(arguments).kind  # checks itself
    if arguments.out.suffix == ".npy" and kind != "prepend":
        raise ValueError(
            f"--out {arguments.out}: a .npy file holds a prepend prompt, got a {kind} one. Name a .safetensors file"
        )


def _config(arguments: argparse.Namespace) -> PromptConfig:
    """Of a new prompt."""
    init = arguments.init or ("labels" if arguments.choices else "vocab")
    return PromptConfig(
        arguments.num_tokens or 100,
        arguments.kind or "prepend",
        init,
        labels=arguments.choices if init == "labels" else None,
        text=arguments.text,
        seed=arguments.seed,
    )


def _prompted(arguments: argparse.Namespace, model: Any, tokenizer: Any) -> PromptModel:
    if not arguments.start:
        return PromptModel(model, _config(arguments), tokenizer=tokenizer)
    prompted = PromptModel(model, {}, tokenizer=tokenizer)
    prompted.load_prompt("default", arguments.start, task=arguments.task)
    return prompted

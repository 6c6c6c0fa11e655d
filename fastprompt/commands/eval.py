# SPDX-License-Identifier: Apache-2.0
"""`fastprompt eval`."""

import argparse
import json
from pathlib import Path

from fastprompt import PromptModel, patch, training
from fastprompt.commands._model import (
    add_example_arguments,
    add_graph_argument,
    add_model_arguments,
    graphed_if_served,
    load,
    positive,
    read_file,
    warn_of_long,
    warn_of_unknown,
)
from fastprompt.commands._outputs import check_outputs, make_folder
from fastprompt.prompts import read_prompt

HELP = (
    "answer examples with a prompt, with several that vote, or with none, and tell how many answers are right"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, its prompts, the examples."""
    add_model_arguments(parser)
    add_graph_argument(parser)
    parser.add_argument(
        "--prompt",
        nargs="*",
        action="extend",
        default=[],
        type=Path,
        metavar="FILE",
        help="prompt files; none: the frozen model",
    )
    parser.add_argument("--task", type=int, help="which prompt of --prompt, a PEFT multitask adapter")
    parser.add_argument("--data", required=True, type=Path, metavar="FILE", help="examples, as for tune")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the answers, a JSON object per example")
    parser.add_argument(
        "--no-targets", action="store_true", help="--data has inputs alone: they are answered, in --out"
    )
    parser.add_argument("--batch-size", type=positive, default=64, help="(default: %(default)s)")
    add_example_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Write the answers, and print the share of right ones."""
    if arguments.task is not None and not arguments.prompt:
        raise ValueError("--task needs --prompt, of whose prompts it is one")
    if arguments.no_targets and not arguments.out:
        raise ValueError("--no-targets needs --out, the file that the answers go to")
    for path in arguments.prompt:  # a broken one shows before the model is loaded
        read_prompt(path, task=arguments.task)
    if arguments.no_targets:
        examples, inputs = [], training.read_inputs(arguments.data, input_field=arguments.input_field)
    else:
        examples = read_file(arguments, arguments.data)
        inputs = [each.input for each in examples]
    check_outputs(None, [arguments.out], [arguments.data, *arguments.prompt, Path(arguments.model)])
    model, tokenizer = load(arguments)
    if examples and not arguments.choices:
        targets = tokenizer([each.target for each in examples])["input_ids"]
        warn_of_long(arguments.data, targets, tokenizer, arguments.max_target)
        warn_of_unknown(targets, tokenizer)
    patch(model)
    names = [f"prompt{number}" for number in range(len(arguments.prompt))]
    if names:
        model = PromptModel(model, {}, tokenizer=tokenizer)
        for name, path in zip(names, arguments.prompt, strict=True):
            model.load_prompt(name, path, task=arguments.task)
    how = {
        "prompts": names or None,
        "choices": arguments.choices,
        "batch_size": arguments.batch_size,
        "max_input": arguments.max_input,
        "max_new_tokens": arguments.max_target,
    }
    if arguments.no_targets:
        answers = training.answer(graphed_if_served(arguments, model), inputs, tokenizer, **how)
        write(arguments.out, [{"input": text} for text in inputs], answers)
        print(f"{len(answers):,} inputs answered in {arguments.out}")
        return 0
    found = training.evaluate(graphed_if_served(arguments, model), examples, tokenizer, **how)
    if arguments.out:  # before the score, which nobody may read
        write(arguments.out, [each._asdict() for each in examples], found.predictions)
    print(f"{found.score:.1%} of {len(examples):,} answers right")
    return 0


def write(path: Path, asked: list[dict[str, str]], answers: list[str]) -> None:
    """A JSON object per line: what was asked, and the answer."""
    make_folder(path)
    with path.open("w", encoding="utf-8") as file:
        for fields, answer in zip(asked, answers, strict=True):
            file.write(json.dumps({**fields, "answer": answer}, ensure_ascii=False) + "\n")

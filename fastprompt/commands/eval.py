# SPDX-License-Identifier: Apache-2.0
"""`fastprompt eval`."""

import argparse
import json
from pathlib import Path

from fastprompt import PromptModel, patch, training
from fastprompt.commands._model import (
    add_example_arguments,
    add_model_arguments,
    check_outputs,
    load,
    make_folder,
    positive,
    read_file,
    warn_of_long,
    warn_of_unknown,
)
from fastprompt.prompts import read_prompt

HELP = "tell how many examples a model answers right with a prompt, with several that vote, or with none"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, its prompts, the examples."""
    add_model_arguments(parser)
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
    parser.add_argument("--batch-size", type=positive, default=64, help="(default: %(default)s)")
    add_example_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the share of right answers."""
    if arguments.task is not None and not arguments.prompt:
        raise ValueError("--task needs --prompt, of whose prompts it is one")
    for path in arguments.prompt:  # a broken one shows before the model is loaded
        read_prompt(path, task=arguments.task)
    examples = read_file(arguments, arguments.data)
    check_outputs(None, [arguments.out], [arguments.data, *arguments.prompt, Path(arguments.model)])
    model, tokenizer = load(arguments)
    if not arguments.choices:
        targets = tokenizer([each.target for each in examples])["input_ids"]
        warn_of_long(arguments.data, targets, tokenizer, arguments.max_target)
        warn_of_unknown(targets, tokenizer)
    patch(model)
    names = [f"prompt{number}" for number in range(len(arguments.prompt))]
    if names:
        model = PromptModel(model, {}, tokenizer=tokenizer)
        for name, path in zip(names, arguments.prompt, strict=True):
            model.load_prompt(name, path, task=arguments.task)
    found = training.evaluate(
        model,
        examples,
        tokenizer,
        prompts=names or None,
        choices=arguments.choices,
        batch_size=arguments.batch_size,
        max_input=arguments.max_input,
        max_new_tokens=arguments.max_target,
    )
    if arguments.out:  # before the score, which nobody may read
        make_folder(arguments.out)
        with arguments.out.open("w", encoding="utf-8") as file:
            for example, answer in zip(examples, found.predictions, strict=True):
                file.write(json.dumps({**example._asdict(), "answer": answer}, ensure_ascii=False) + "\n")
    print(f"{found.score:.1%} of {len(examples):,} answers right")
    return 0

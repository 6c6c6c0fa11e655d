# SPDX-License-Identifier: Apache-2.0
"""What commands with a model share: their arguments, and the model itself."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from fastprompt._family import SERVED
from fastprompt.graphs import graphed
from fastprompt.training import Example, read_examples
from fastprompt.training.batches import lengths_over
from fastprompt.training.examples import check_targets

DTYPES = ("float32", "bfloat16", "float16")


def positive(text: str) -> int:
    """An argument that is an int of 1 or more."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {value}")
    return value


def add_model_arguments(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """--model, --device and --dtype."""
    parser.add_argument(
        "--model", required=required, help="a T5's name on the Hugging Face Hub, or its folder"
    )
    parser.add_argument("--device", help='such as "cpu" or "cuda"; default: a GPU if there is one')
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, float32 on a CPU")


def add_graph_argument(parser: argparse.ArgumentParser) -> None:
    """--no-graphs."""
    parser.add_argument(
        "--no-graphs", action="store_true", help="on a GPU, launch kernels one by one, not as CUDA graphs"
    )


def add_example_arguments(parser: argparse.ArgumentParser) -> None:
    """How examples are read and answered."""
    parser.add_argument("--input-field", default="input", help="of a file's examples (default: %(default)s)")
    parser.add_argument("--target-field", default="target", help="(default: %(default)s)")
    parser.add_argument(
        "--max-input", type=positive, default=512, help="tokens that are read (default: %(default)s)"
    )
    parser.add_argument(
        "--max-target",
        type=positive,
        default=128,
        help="tokens of an answer, without its end marker (default: %(default)s)",
    )
    parser.add_argument(
        "--choices",
        nargs="+",
        action="extend",
        metavar="TARGET",
        help="the answers there are: one is chosen, none generated",
    )


def read_file(arguments: argparse.Namespace, path: Path) -> list[Example]:
    """The examples of a file. ValueError: a target is none of the --choices."""
    examples = read_examples(path, input_field=arguments.input_field, target_field=arguments.target_field)
    if arguments.choices:
        check_targets(f"{path}: targets must be among --choices", examples, arguments.choices)
    return examples


def too_long(targets: Sequence[Sequence[int]], tokenizer: Any, limit: int) -> str | None:
    """How many targets, given as token ids, are longer than --max-target; None: none is."""
    if long := lengths_over(targets, tokenizer, limit):
        return f"{len(long):,} of {len(targets):,} targets have more than --max-target={limit} tokens"
    return None


def warn_of_long(path: Path, targets: Sequence[Sequence[int]], tokenizer: Any, limit: int) -> None:
    """Say so on stderr: no generated answer can be one of those."""
    if said := too_long(targets, tokenizer, limit):
        print(f"{path}: {said}, and answers do not", file=sys.stderr)


def warn_of_unknown(targets: Sequence[Sequence[int]], tokenizer: Any) -> None:
    """Say on stderr how many targets, given as token ids, the tokenizer does not know whole."""
    unknown = sum(tokenizer.unk_token_id in target for target in targets)
    if unknown:
        print(
            f"{unknown:,} of {len(targets):,} targets have words that the tokenizer does not know: the model cannot "
            "say them",
            file=sys.stderr,
        )


def device_and_dtype(arguments: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """Those asked for, or their defaults."""
    try:
        device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device).tolist()  # the meta device has no values
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {arguments.device}: PyTorch cannot use it here: {reason}") from None
    return device, getattr(torch, arguments.dtype or ("bfloat16" if device.type == "cuda" else "float32"))


def graphed_if_served(arguments: argparse.Namespace, model: Any) -> Any:
    """What runs steps and generates: on a GPU CUDA graphs, of models known never to make the host wait for a value."""
    served = model.device.type == "cuda" and model.config.model_type in SERVED
    return graphed(model) if served and not arguments.no_graphs else model


def check_model(name: str) -> None:
    """ValueError: it is the path of a folder that is not there. transformers would take it for a name on the Hub."""
    if name.startswith(("/", ".", "~")) and not Path(name).is_dir():
        raise ValueError(f"--model {name}: there is no such folder")


def load(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """(the model, in evaluation mode on its device; its tokenizer)."""
    check_model(arguments.model)
    device, dtype = device_and_dtype(arguments)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForSeq2SeqLM.from_pretrained(arguments.model, dtype=dtype)
    return model.to(device).eval(), tokenizer

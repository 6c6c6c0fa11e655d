# SPDX-License-Identifier: Apache-2.0
"""What commands with a model share: their arguments, and the model itself."""

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

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


def add_example_arguments(parser: argparse.ArgumentParser) -> None:
    """How examples are read and answered."""
    parser.add_argument("--input-field", default="input", help="of a file's examples (default: %(default)s)")
    parser.add_argument("--target-field", default="target", help="(default: %(default)s)")
    parser.add_argument(
        "--max-input", type=positive, default=512, help="tokens that are read (default: %(default)s)"
    )
    parser.add_argument(
        "--max-target", type=positive, default=128, help="tokens of an answer (default: %(default)s)"
    )
    parser.add_argument(
        "--choices",
        nargs="+",
        action="extend",
        metavar="TARGET",
        help="the answers there are: one is chosen, none generated",
    )


def check_outputs(prompt: Path | None, others: Iterable[Path | None], inputs: Iterable[Path | None]) -> None:
    """Can these files be written, over none that is read? Asked before hours of work; their folders are made.

    ``prompt`` is a file that replaces what is there, and so needs a folder that may be written to; others are written
    in place. ``inputs`` may be folders, of which all files are read.
    """
    outputs = [path for path in (prompt, *others) if path is not None]
    taken = {path.resolve() for path in inputs if path is not None}
    for path in outputs:
        own = path.resolve()
        if own in taken or any(folder in taken and folder.is_dir() for folder in own.parents):
            raise ValueError(
                f"{path}: is another file of this command, and would be lost. Name one of its own"
            )
        taken.add(own)
    for path in outputs:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            fits = _is_open(path.parent)
        elif path == prompt:
            fits = path.is_file() and _is_open(path.resolve().parent)
        else:
            fits = not path.is_dir() and os.access(path, os.W_OK)
        if not fits:
            raise ValueError(f"{path}: cannot be written. Name a file, in a folder that you may write to")


def _is_open(folder: Path) -> bool:
    """May files be made there? Permissions do not tell of all folders."""
    with suppress(OSError), TemporaryFile(dir=folder):
        return True
    return False


def warn_of_unknown(targets: Sequence[Sequence[int]], tokenizer: Any) -> None:
    """Say on stderr how many targets, as token ids, no answer can be."""
    unknown = sum(tokenizer.unk_token_id in target for target in targets)
    if unknown:
        print(
            f"{unknown:,} of {len(targets):,} targets have words that the tokenizer does not know: the model cannot "
            "say them",
            file=sys.stderr,
        )


def device_and_dtype(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """The torch.device and torch.dtype asked for, or their defaults."""
    import torch

    try:
        device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device).tolist()  # the meta device has no values
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {arguments.device}: PyTorch cannot use it here: {reason}") from None
    return device, getattr(torch, arguments.dtype or ("bfloat16" if device.type == "cuda" else "float32"))


def load(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """(the model, in evaluation mode on its device; its tokenizer)."""
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    device, dtype = device_and_dtype(arguments)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForSeq2SeqLM.from_pretrained(arguments.model, dtype=dtype)
    return model.to(device).eval(), tokenizer

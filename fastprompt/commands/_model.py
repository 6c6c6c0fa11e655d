# SPDX-License-Identifier: Apache-2.0
"""What commands with a model share: their arguments, and the model itself."""

import argparse
import os
from pathlib import Path
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


def check_writable(path: Path | None) -> None:
    """Before hours of work, not after; the file's folder is made."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"{path}: cannot be written. Name a file, in a folder that you may write to")


def device_and_dtype(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """The torch.device and torch.dtype asked for, or their defaults."""
    import torch

    try:
        device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
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

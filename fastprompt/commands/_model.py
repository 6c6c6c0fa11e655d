# SPDX-License-Identifier: Apache-2.0
"""What commands with a model share: its arguments, and the model, patched."""

import argparse
from typing import Any

MEMORY = ("speed", "balanced", "lean", "minimal")
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
        "--choices", nargs="+", metavar="TARGET", help="the answers there are: one is chosen, none generated"
    )


def device_and_dtype(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """The torch.device and torch.dtype asked for, or their defaults."""
    import torch

    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {arguments.device}: PyTorch sees no GPU here. Leave it out, or use cpu")
    return device, getattr(torch, arguments.dtype or ("bfloat16" if device.type == "cuda" else "float32"))


def load(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """(the model, in evaluation mode on its device; its tokenizer)."""
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    device, dtype = device_and_dtype(arguments)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForSeq2SeqLM.from_pretrained(arguments.model, dtype=dtype)
    return model.to(device).eval(), tokenizer

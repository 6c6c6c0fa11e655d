# SPDX-License-Identifier: Apache-2.0
"""The command line: ``fastprompt demo | doctor | inspect``."""

import argparse
import importlib.metadata
import os
import platform
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand and return its exit status; ``argv`` defaults to the process's arguments."""
    try:
        status = _run(argv)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status


def _run(argv: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(prog="fastprompt", description="Prompt tuning for a frozen T5.")
    parser.add_argument("--version", action="version", version=f"fastprompt {_version('fastprompt')}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser(
        "demo", add_help=False, help="train a soft prompt on real text with the tiny T5 shipped here"
    )
    commands.add_parser("doctor", help="say what is installed and which backend each op uses on this machine")
    inspect = commands.add_parser("inspect", help="show what a prompt file holds")
    inspect.add_argument("path", help="a .safetensors or .npy prompt, or the folder of a PEFT adapter")
    inspect.add_argument("--task", type=int, help="which prompt of a PEFT multitask adapter")
    arguments, rest = parser.parse_known_args(argv)
    if arguments.command == "demo":
        from fastprompt.demo import main as demo

        return demo(rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return doctor() if arguments.command == "doctor" else inspect_prompt(arguments.path, arguments.task)


def doctor() -> int:
    """Print versions, the devices found, and every op's backends, the default first."""
    import torch

    import fastprompt
    from fastprompt import _native, _op

    print(
        f"fastprompt   {fastprompt.__version__} on Python {platform.python_version()}, {platform.platform()}"
    )
    for package in ("torch", "transformers", "triton", "peft"):
        print(f"{package:12} {_version(package)}")
    print(f"CPU kernels  {', '.join(_native.CPU_TARGETS) or 'none: build the extension for CPU speed'}")
    print(f"CUDA kernels {'built' if 'cuda' in _native.TARGETS else 'not built'}")
    print(f"GPU          {torch.cuda.get_device_name() if torch.cuda.is_available() else 'none'}")
    for name in _op.OPS:
        found = [f"{device}: {', '.join(fastprompt.backends(name, device))}" for device in ("cpu", "cuda")]
        print(f"{name:12} {'; '.join(found)}")
    return 0


def inspect_prompt(path: str, task: int | None = None) -> int:
    """Print what the prompt file at ``path`` holds; 1 and a message on stderr where it cannot be read."""
    import torch

    from fastprompt.prompts.files import read_prompt

    try:
        prompt = read_prompt(path, task=task)
    except (OSError, TypeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    parameters = sum(tensor.numel() for tensor in prompt.tensors.values())
    if prompt.kind == "prefix":
        print(
            f"{path}: prefix prompt, parameterization {prompt.parameterization} ({parameters:,} parameters)"
        )
        for name, tensor in prompt.tensors.items():
            print(f"{name}: {' x '.join(map(str, tensor.shape))}")
    else:
        P, D = prompt.rows.shape
        print(f"{path}: {prompt.kind} prompt of {P} rows, width {D} ({parameters:,} trained parameters)")
    norms = torch.cat([tensor.flatten(0, -2).norm(dim=1) for tensor in prompt.tensors.values()])
    print(f"row norms: least {norms.min():.3g}, median {norms.median():.3g}, greatest {norms.max():.3g}")
    for what, value in (("name", prompt.name), ("initialiser", prompt.init), ("model", prompt.model)):
        if value is not None:
            print(f"{what}: {value}")
    return 0


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    sys.exit(main())

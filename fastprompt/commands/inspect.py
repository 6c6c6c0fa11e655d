# SPDX-License-Identifier: Apache-2.0
"""`fastprompt inspect`."""

import argparse

import torch

from fastprompt.commands._terminal import printable
from fastprompt.prompts.files import read_prompt

HELP = "show what a prompt file holds"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The file, and which of its prompts."""
    parser.add_argument("path", help="a .safetensors or .npy prompt, or the folder of a PEFT adapter")
    parser.add_argument("--task", type=int, help="which prompt of a PEFT multitask adapter")


def run(arguments: argparse.Namespace) -> int:
    """Print what the prompt file holds."""
    path = arguments.path
    prompt = read_prompt(path, task=arguments.task)
    parameters = sum(tensor.numel() for tensor in prompt.tensors.values())
    if prompt.kind == "prefix":
        print(
            f"{path}: prefix prompt, parameterization {prompt.parameterization} ({parameters:,} trained parameters)"
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
            print(f"{what}: {printable(str(value))}")
    return 0

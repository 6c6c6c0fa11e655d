# SPDX-License-Identifier: Apache-2.0
"""`fastprompt doctor`."""

import argparse
import importlib
import importlib.metadata
import importlib.util
import platform

import torch

import fastprompt
from fastprompt import _native
from fastprompt.commands._terminal import printable
from fastprompt.dispatch import OPS

HELP = "say what is installed and which backend each op uses on this machine"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None."""


def run(arguments: argparse.Namespace) -> int:
    """Print versions, the devices found, and every op's backends, the default first."""
    print(
        f"{'fastprompt':20} {fastprompt.__version__} on Python {platform.python_version()}, {platform.platform()}"
    )
    for package in ("torch", "transformers", "triton", "peft"):
        print(f"{package:20} {version(package)}")
    missing = "build the extension for CPU speed" if _native.builds_here() else "they are for Linux"
    print(f"{'CPU kernels':20} {', '.join(_native.CPU_TARGETS) or f'none: {missing}'}")
    print(f"{'CUDA kernels':20} {'built' if 'cuda' in _native.TARGETS else 'not built'}")
    # A source tree has them elsewhere.
    there = importlib.util.find_spec("fastprompt.triton_kernels") is not None
    print(f"{'Triton kernels':20} {'installed' if there else 'not installed'}")
    print(f"{'GPU':20} {torch.cuda.get_device_name() if torch.cuda.is_available() else 'none'}")
    for name in OPS:
        found = [f"{device}: {', '.join(fastprompt.backends(name, device))}" for device in ("cpu", "cuda")]
        print(f"{name:20} {'; '.join(found)}")
    return 0


def version(package: str) -> str:
    """A package's version, or that it is not installed; and why its import fails if it does."""
    try:
        found = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
    try:
        importlib.import_module(package)
    except (Exception, SystemExit) as error:  # whatever another package's modules raise
        return f"{found}, but import {package} fails: {printable(str(error))}"
    return found

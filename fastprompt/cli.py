# SPDX-License-Identifier: Apache-2.0
"""The command line: ``fastprompt demo | tune | eval | bench | inspect | doctor``."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from io import TextIOWrapper

import fastprompt
from fastprompt.commands._terminal import printable

COMMANDS = ("demo", "tune", "eval", "bench", "inspect", "doctor")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand and return its exit status; ``argv`` defaults to the process's arguments."""
    # Python has None for what is closed, as by `>&-`.
    with (
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        redirect_stdout(sys.stdout or nowhere),
        redirect_stderr(sys.stderr or nowhere),
    ):
        if isinstance(sys.stdout, TextIOWrapper) and sys.stdout.errors == "strict":
            # Names of files, and what is in them, may have characters that the terminal's encoding has not.
            sys.stdout.reconfigure(errors="backslashreplace")
        return _guarded(argv)


def _guarded(argv: Sequence[str] | None) -> int:
    """The exit status, also where the user or the reader has seen enough."""
    try:
        status = _run(argv)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader has seen enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status


def _run(argv: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(prog="fastprompt", description="Prompt tuning for a frozen T5.")
    parser.add_argument("--version", action="version", version=f"fastprompt {fastprompt.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    modules = {name: importlib.import_module(f"fastprompt.commands.{name}") for name in COMMANDS}
    for name, module in modules.items():
        said = f"{module.HELP[0].upper()}{module.HELP[1:]}."
        subparser = commands.add_parser(name, help=module.HELP, description=said)
        module.add_arguments(subparser)
    arguments = parser.parse_args(argv)
    try:
        return modules[arguments.command].run(arguments)
    except BrokenPipeError:
        raise
    except (OSError, TypeError, ValueError, FloatingPointError, OverflowError, IndexError) as error:
        print(*map(printable, str(error).splitlines()), sep="\n", file=sys.stderr)
        return 1

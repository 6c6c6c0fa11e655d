# SPDX-License-Identifier: Apache-2.0
"""The files that a command writes: whether it may, and their folders."""

import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile


def check_outputs(prompt: Path | None, others: Iterable[Path | None], inputs: Iterable[Path | None]) -> None:
    """ValueError: one of these files cannot be written, or would replace another or one that is read.

    Asked before hours of work; nothing is made. ``prompt`` is a file that replaces what is there, and so needs a
    folder that may be written to; others are written in place. ``inputs`` may be folders, of which all files are read,
    or names on the Hub: a folder of that name, once it is made, would be read instead.
    """
    outputs = [(path, real(path)) for path in (prompt, *others) if path is not None]
    read = {real(path) for path in inputs if path is not None}
    folders = {folder for _, own in outputs for folder in own.parents}
    taken = set(read)
    for path, own in outputs:
        there = next((folder for folder in own.parents if os.path.lexists(folder)), own)
        if not there.is_dir():
            raise ValueError(f"{path}: {there} is a file, not a folder. Name a file in a folder")
        if not read.isdisjoint(own.parents):
            raise ValueError(
                f"{path}: lies in the folder of --model (or --prompt, --start), whose files this command reads. Name "
                "one elsewhere"
            )
        if own in taken:
            raise ValueError(
                f"{path}: is another file of this command, and would be lost. Name one of its own"
            )
        taken.add(own)
        if own in folders or not _is_writable(path, there, replaced=path == prompt):
            raise ValueError(f"{path}: cannot be written. Name a file, in a folder that you may write to")


def real(path: Path) -> Path:
    """The path behind links, also where they are a loop."""
    return Path(os.path.realpath(path))


def make_folder(path: Path) -> None:
    """The folder of a file that is about to be written."""
    real(path).parent.mkdir(parents=True, exist_ok=True)


def _is_writable(path: Path, there: Path, *, replaced: bool) -> bool:
    """May this file be written, of whose folders ``there`` is the nearest that exists?"""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return _is_open(there)
    except OSError:  # a loop of links, a folder that may not be searched
        return False
    if replaced:
        return stat.S_ISREG(mode) and _is_open(there)
    return not stat.S_ISDIR(mode) and os.access(path, os.W_OK)


def _is_open(folder: Path) -> bool:
    """May files be made there? One is, as permissions do not tell of all folders."""
    with suppress(OSError), TemporaryFile(dir=folder):
        return True
    return False

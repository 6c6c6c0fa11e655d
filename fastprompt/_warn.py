# SPDX-License-Identifier: Apache-2.0
"""Warnings at the line that called this package."""

import sys
import warnings
from types import FrameType


def warn(message: str) -> None:
    """As warnings.warn, at the caller's line."""
    frame, level = sys._getframe(1), 2
    while frame.f_back and _lies_between(frame):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def _lies_between(frame: FrameType) -> bool:
    """Of this package, or of a decorator or a ``with`` block around it?"""
    name = frame.f_globals.get("__name__", "")
    return name == "contextlib" or name.startswith(("fastprompt.", "torch."))

# SPDX-License-Identifier: Apache-2.0
"""Does a stack replay graphs in place of its forward?"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def replayed(stack: Any, forward: Any) -> Iterator[None]:
    """A ``with`` block in which ``forward`` runs in place of the stack's own."""
    forward.fastprompt_replays = True
    stack.forward = forward
    try:
        yield
    finally:
        del stack.forward


def is_replayed(stack: Any) -> bool:
    return getattr(vars(stack).get("forward"), "fastprompt_replays", False)

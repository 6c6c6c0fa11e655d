# SPDX-License-Identifier: Apache-2.0
"""Does a stack replay graphs in place of its forward?"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import update_wrapper
from types import MethodType
from typing import Any

import torch


class _Replay:
    """A stack's forward for a while. Of a copy of the stack, in a file, too, it is the copy's own."""

    def __init__(self, stack: Any, replay: Callable[..., Any]) -> None:
        update_wrapper(self, stack.forward)
        self.stack, self._own, self._replay = stack, stack.forward, replay

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._replay(self._own, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _OfCopy(memo.get(id(self.stack), self.stack))

    def __reduce__(self) -> Any:
        return _OfCopy, (self.stack,)


class _OfCopy:
    """What a copy that was made meanwhile has for its forward, until it is called or settled."""

    def __init__(self, stack: Any) -> None:
        self.stack = stack

    @property
    def __wrapped__(self) -> Any:
        return MethodType(type(self.stack).forward, self.stack)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():  # PyTorch 2.11 cannot trace it
            settle(self.stack)
        return type(self.stack).forward(self.stack, *args, **kwargs)


@contextmanager
def replayed(stack: Any, replay: Callable[..., Any]) -> Iterator[None]:
    """A ``with`` block in which the stack's forward is ``replay(forward, ...)``, told what it takes the place of."""
    stack.forward = _Replay(stack, replay)
    try:
        yield
    finally:
        del stack.forward


def is_replayed(stack: Any) -> bool:
    found = vars(stack).get("forward")
    return isinstance(found, _Replay) and found.stack is stack


def settle(stack: Any) -> None:
    """Leave nothing to a copy of the replays of the stack that it was made of."""
    if isinstance(vars(stack).get("forward"), (_Replay, _OfCopy)) and not is_replayed(stack):
        vars(stack).pop("forward", None)

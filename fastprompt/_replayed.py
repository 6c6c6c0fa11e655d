# SPDX-License-Identifier: Apache-2.0
"""Does a stack replay graphs in place of its forward?"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import update_wrapper
from types import MethodType
from typing import Any


class _Replay:
    """A stack's forward for a while. Of a copy of the stack, in a file, too, it is the copy's own."""

    def __init__(self, stack: Any, forward: Any) -> None:
        update_wrapper(self, forward)
        self._stack, self._forward = stack, forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._forward(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _OfCopy(memo.get(id(self._stack), self._stack))

    def __reduce__(self) -> Any:
        return _OfCopy, (self._stack,)


class _OfCopy:
    """What a copy that was made meanwhile has for its forward, until it is called or settled."""

    def __init__(self, stack: Any) -> None:
        self._stack = stack

    @property
    def __wrapped__(self) -> Any:
        return MethodType(type(self._stack).forward, self._stack)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        settle(self._stack)
        return self.__wrapped__(*args, **kwargs)


@contextmanager
def replayed(stack: Any, forward: Any) -> Iterator[None]:
    """A ``with`` block in which ``forward`` runs in place of the stack's own."""
    stack.forward = _Replay(stack, forward)
    try:
        yield
    finally:
        del stack.forward


def is_replayed(stack: Any) -> bool:
    return isinstance(vars(stack).get("forward"), _Replay)


def settle(stack: Any) -> None:
    """Leave nothing to a copy of the replays of the stack that it was made of."""
    if isinstance(vars(stack).get("forward"), _OfCopy):
        vars(stack).pop("forward", None)

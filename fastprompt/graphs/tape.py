# SPDX-License-Identifier: Apache-2.0
"""A function as the operations that it ran, on a CPU: they run again on the same tensors, without the Python around."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastprompt import _native
from fastprompt._op import running
from fastprompt._plain import PLAIN_TYPES, capturing


class UnrecordableError(RuntimeError):
    """The function reads a value of a tensor, which another run would have changed, or tensors of another class."""


class Tape:
    """A function without arguments that reads no value of a tensor, on a CPU. It runs once to be recorded.

    A replay reads and writes the tensors that the recorded run did; what the host knew then is fixed.

    UnrecordableError: it reads a value, or has tensors of a class of their own, whose memory is elsewhere. What it had
    written by then is written.
    """

    def __init__(self, run: Callable[[], Any]) -> None:
        recorder = _Recorder()
        # In that mode tensors may be written to which were made in it, and no operation counts or records for autograd.
        with torch.inference_mode(), capturing(), _native.recorded_calls(recorder.operations), recorder:
            self.result = run()
        self._operations = _needed(recorder.operations, self.result)

    def replay(self) -> Any:
        """What the recorded run returned: tensors that the next replay overwrites."""
        _native.take_torchs_threads()
        with torch.inference_mode():
            for operation in self._operations:
                operation()
        return self.result


class _Operation:
    """One of PyTorch's, which writes to its arguments or has made tensors of memory of their own."""

    def __init__(
        self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], made: list[Tensor]
    ) -> None:
        self.function, self.arguments, self.kwargs, self.made = function, args, kwargs, made

    def again(self) -> Callable[[], Any]:
        """A function that writes to the memory of those tensors what it makes of the arguments now."""
        if not self.made:
            return partial(self.function, *self.arguments, **self.kwargs)
        writes = _with_out(self.function)
        if writes is not None and len(self.made) == 1:
            return partial(writes, *self.arguments, **self.kwargs, out=self.made[0])
        return self._copied

    def _copied(self) -> None:
        found = _tensors(self.function(*self.arguments, **self.kwargs))
        for x, y in zip(self.made, found[-len(self.made) :], strict=True):
            x.copy_(y)


class _Recorder(TorchDispatchMode):
    """Notes operations, but for views and memory without values; kernels note their calls in the same list."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Any] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function.namespace == "fastprompt":
            with self:  # of which the operations inside are noted
                return running(function.__name__.partition(".")[0], "CPU")(*args)
        result = function(*args, **kwargs)
        if _reads_values(function, args, result):
            raise UnrecordableError(f"{function} reads a value")
        for x in _tensors((args, kwargs, result)):
            if type(x) not in PLAIN_TYPES:
                raise UnrecordableError(f"{function} has a {type(x).__name__}")
        given = _storages((args, kwargs))
        made = [x for x in _tensors(result) if x.untyped_storage().data_ptr() not in given]
        if (made and not _is_empty(function)) or function._schema.is_mutable:
            self.operations.append(_Operation(function, args, kwargs, made))
        return result


def _reads_values(function: Any, args: Any, result: Any) -> bool:
    """Is what it returns a number, or does the shape of that stand on what its arguments hold?"""
    if isinstance(result, int | float | complex):
        return True
    if function is torch.ops.aten.index.Tensor:
        return any(x.dtype in (torch.bool, torch.uint8) for x in _tensors(args[1]))
    return torch.Tag.dynamic_output_shape in function.tags


def _is_empty(function: Any) -> bool:
    return function.__name__.startswith(("empty", "new_empty"))


def _with_out(function: Any) -> Any:
    """The overload that writes what ``function`` returns to a tensor ``out``; None: none takes its arguments."""
    packet = function.overloadpacket
    given = {each.name for each in function._schema.arguments}
    for name in packet.overloads():
        overload = getattr(packet, name)
        if {each.name for each in overload._schema.arguments} == given | {"out"}:
            types = {each.name: str(each.type) for each in overload._schema.arguments}
            if all(types[each.name] == str(each.type) for each in function._schema.arguments):
                return overload
    return None


def _needed(operations: list[Any], result: Any) -> list[Callable[[], Any]]:
    """Those that write to what was there before, or make what a later one or the result needs."""
    needed, read = [], _storages(result)
    for operation in reversed(operations):
        made = _storages(operation.made) if isinstance(operation, _Operation) else set()
        if made and made.isdisjoint(read):
            continue
        read |= _storages((operation.arguments, getattr(operation, "kwargs", None)))
        needed.append(operation.again() if isinstance(operation, _Operation) else operation)
    return needed[::-1]


def _tensors(values: Any) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]


def _storages(values: Any) -> set[int]:
    return {x.untyped_storage().data_ptr() for x in _tensors(values)}

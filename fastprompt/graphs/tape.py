# SPDX-License-Identifier: Apache-2.0
"""A function as the operations that it ran, on a CPU: they run again on the same tensors, without the Python around."""

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastprompt import _native
from fastprompt.dispatch.op import registered_for
from fastprompt.dispatch.plain import PLAIN_TYPES, capturing, is_capturing


class Tape:
    """What a function without arguments runs on a CPU, noted in a run like any other; ``result`` is what it returned.

    A replay reads and writes the memory that the run did; what the host knew then is fixed. ``obstacle`` says what
    forbids one: the function reads a value of a tensor, which another run would have changed, or has tensors whose
    memory is not their own. None: nothing does.
    """

    def __init__(self, run: Callable[[], Any]) -> None:
        self.obstacle: str | None = "it runs while another is recorded"
        if is_capturing(torch.device("cpu")):
            self.result = run()
            return
        recorder = _Recorder()
        # Outside inference mode, in which a mode sees operations whole that stand on others.
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            capturing(),
            _native.recorded_calls(recorder.operations),
            _Reads(recorder),
            recorder,
        ):
            self.result = run()
        self.obstacle = recorder.obstacle
        operations = [each if isinstance(each, _Operation) else _Call(*each) for each in recorder.operations]
        kept = [] if self.obstacle else _needed(operations, self.result)
        self._operations = [each.again() for each in kept]
        # A parameter may be given other memory meanwhile.
        self._memory = [x.untyped_storage() for each in kept for x in _tensors(each.args, each.kwargs)]

    def replay(self) -> Any:
        """What the recorded run returned: tensors that the next replay overwrites."""
        _native.take_torchs_threads()
        with torch.inference_mode():  # in which nothing counts writes
            for operation in self._operations:
                operation()
        return self.result


class _Call(NamedTuple):
    """One of a native kernel, which writes to memory that was made for it."""

    call: Callable[[], Any]
    args: tuple[Any, ...]
    kwargs: None = None

    def again(self) -> Callable[[], Any]:
        return self.call


class _Operation(NamedTuple):
    """One of PyTorch's, which writes to its arguments or has made tensors of memory of their own."""

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    made: dict[int, Tensor]  # by their place among the tensors of the result

    def again(self) -> Callable[[], Any]:
        """A function that writes to the memory of those tensors what it makes of the arguments now."""
        if not self.made:
            return partial(self.function, *self.args, **self.kwargs)
        writes = None if self.function._schema.is_mutable or len(self.made) > 1 else _with_out(self.function)
        if writes is not None:
            (out,) = self.made.values()
            return partial(writes, *self.args, **self.kwargs, out=out)
        return self._copied

    def _copied(self) -> None:
        found = _tensors(self.function(*self.args, **self.kwargs))
        for i, x in self.made.items():
            if found[i].shape != x.shape:
                raise RuntimeError(
                    f"fastprompt.graphed: {self.function} gave another shape than when recorded"
                )
            x.copy_(found[i])


class _Recorder(TorchDispatchMode):
    """Notes operations, but for views and memory without values; kernels note their calls in the same list."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Any] = []
        self.obstacle: str | None = None

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function.namespace == "fastprompt":
            with self:  # of which the operations inside are noted
                return registered_for(function.__name__.partition(".")[0], "CPU")(*args)
        result = function(*args, **kwargs)
        if self.obstacle is None:
            self.obstacle = _obstacle(function, args, kwargs, result)
        if self.obstacle is not None:
            return result
        given = _storages(args, kwargs)
        made = {i: x for i, x in enumerate(_tensors(result)) if x.untyped_storage().data_ptr() not in given}
        if (made and not _is_empty(function)) or function._schema.is_mutable:
            self.operations.append(_Operation(function, args, kwargs, made))
        return result


class _Reads(TorchFunctionMode):
    """Sees tensors being read without an operation."""

    NAMES = ("tolist", "numpy", "__array__", "__dlpack__")

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        if name in self.NAMES:
            self.recorder.obstacle = f"{name} reads a value"
        return function(*args, **(kwargs or {}))


def _obstacle(function: Any, args: Any, kwargs: Any, result: Any) -> str | None:
    """Why it cannot be run again in place; None if it can."""
    for x in _tensors(args, kwargs, result):
        if type(x) not in PLAIN_TYPES or x.layout != torch.strided:
            return f"{function} has a {type(x).__name__} of layout {x.layout}"
    if any(isinstance(each, int | float | complex) for each in _leaves(result)):
        return f"{function} reads a value"
    if function is torch.ops.aten.index.Tensor:
        reads = any(x.dtype in (torch.bool, torch.uint8) for x in _tensors(args[1]))
    else:
        reads = torch.Tag.dynamic_output_shape in function.tags
    if reads:
        return f"{function} reads a value"
    changes = torch.Tag.inplace_view in function.tags or function.__name__.startswith(("resize", "set_."))
    return f"{function} changes a tensor's shape or memory" if changes else None


def _is_empty(function: Any) -> bool:
    return function.__name__.startswith(("empty", "new_empty"))


@cache
def _with_out(function: Any) -> Any:
    """The overload that writes what ``function`` returns to a tensor ``out``; None: none takes its arguments."""
    packet = function.overloadpacket
    given = {each.name: str(each.type) for each in function._schema.arguments}
    for name in packet.overloads():
        overload = getattr(packet, name)
        taken = {each.name: str(each.type) for each in overload._schema.arguments}
        if taken.pop("out", None) is not None and taken == given:
            return overload
    return None


def _needed(operations: list[_Call | _Operation], result: Any) -> list[_Call | _Operation]:
    """But for those of PyTorch's that only make what neither a later one nor the result needs."""
    needed, read = [], _storages(tree_leaves(result))
    for each in reversed(operations):
        only_makes = isinstance(each, _Operation) and each.made and not each.function._schema.is_mutable
        if only_makes and _storages(each.made).isdisjoint(read):  # type: ignore[union-attr]
            continue
        read |= _storages(each.args, each.kwargs)
        needed.append(each)
    return needed[::-1]


def _leaves(*values: Any) -> Iterator[Any]:
    """Of arguments and results of operations, which are lists, tuples and dictionaries at most."""
    for value in values:
        if isinstance(value, tuple | list):
            yield from _leaves(*value)
        elif isinstance(value, dict):
            yield from _leaves(*value.values())
        else:
            yield value


def _tensors(*values: Any) -> list[Tensor]:
    return [x for x in _leaves(*values) if isinstance(x, Tensor)]


def _storages(*values: Any) -> set[int]:
    return {x.untyped_storage().data_ptr() for x in _tensors(*values)}

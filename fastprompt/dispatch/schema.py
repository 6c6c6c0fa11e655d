# SPDX-License-Identifier: Apache-2.0
"""One schema of an op, and what runs its calls: the first backend that covers the arguments, else the reference."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from fastprompt import _native

Function = Callable[..., Any]


@dataclass(eq=False)
class Schema:
    """A dispatcher op, e.g. fastprompt::rms_norm_backward, and all its implementations.

    Args:
        name: without the namespace.
        reference, native, triton: the launchers that its page attached.
        check: raises where arguments do not fit.
        record: ``(*inputs, run)`` -> output with a gradient, if the schema has one.
        known: descriptions (``csrc/describe.h``) of arguments that passed the check -> their device's dispatch key.
        registered: dispatch key -> what is registered, the last one on top.
    """

    name: str
    reference: Function
    check: Function
    native: Function | None = None
    triton: Function | None = None
    record: Function | None = None
    known: dict[bytes, str] = field(default_factory=dict)
    registered: dict[str, list["Registered"]] = field(default_factory=dict)


class Registered:
    """What is registered under a device's dispatch key: of (backend, launcher) pairs the first that does not return
    NotImplemented, else the reference; ``note(schema, backend)`` is told which it was.
    """

    def __init__(
        self, schema: Schema, choices: list[tuple[str, Function]], note: Callable[[Schema, str], None]
    ) -> None:
        self.backends = [backend for backend, _ in choices]
        self._schema, self._note = schema, note
        self._every = [*choices, ("reference", schema.reference)]

    def __call__(self, *args: Any) -> Any:
        self._schema.check(*args)
        return self.unchecked(*args)

    def unchecked(self, *args: Any) -> Any:
        """The same without a look at the arguments."""
        _native.take_torchs_threads()
        for backend, function in self._every:
            result = function(*args)
            if result is not NotImplemented:
                self._note(self._schema, backend)
                return result
        raise AssertionError("the reference, which comes last, covers everything")


def either(first: Function, second: Function) -> Function:
    """``second`` for what ``first`` does not cover."""

    def run(*args: Any) -> Any:
        result = first(*args)
        return second(*args) if result is NotImplemented else result

    return run


def where(condition: Callable[..., bool], function: Function) -> Function:
    """``function`` for arguments that the condition is true of."""

    def run(*args: Any) -> Any:
        return function(*args) if condition(*args) else NotImplemented

    return run


def where_tensors_are(function: Function) -> Function:
    """``function`` with its tensors' GPU as the current one, to which the CUDA runtime launches."""

    def run(*args: Any) -> Any:
        device = next(x.device for x in args if isinstance(x, torch.Tensor))
        if not _native.is_elsewhere(device):
            return function(*args)
        with torch.cuda.device(device):
            return function(*args)

    return run

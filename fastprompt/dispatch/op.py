# SPDX-License-Identifier: Apache-2.0
"""An op: its schemas, and the backends that this machine has for each device.

A page creates one :class:`Op` and attaches to it, for every schema it defines (a forward and its backward, say):

- ``op.define(schema, check=..., fake=...)`` on the readable reference, which serves every device that has nothing
  better. ``check`` raises where the arguments do not fit, ``fake`` makes empty results; all implementations come after
  ``check`` and trust what it has seen;
- ``op.native`` on the launcher of the C++ and CUDA kernels: ``(kernels, *arguments)``. CPU and CUDA kernels of one
  name have one signature, so a page needs one launcher for every instruction set and the GPU;
- ``op.triton`` on the launcher of the Triton kernels: ``(*arguments)``;
- ``op.autograd(...)``.

:meth:`Op.publish` registers the best of them, :meth:`Op.use` another one for a scope. A launcher returns
``NotImplemented`` for a case that its kernel does not cover (float64, say); the device's next backend or at last the
reference then runs, as :func:`backend_used` tells.
"""

import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from fastprompt import _native
from fastprompt.dispatch.calls import direct, direct_call
from fastprompt.dispatch.gradient import autograd_kernel, differentiable
from fastprompt.dispatch.schema import Function, Registered, Schema, either, where, where_tensors_are

LIBRARY = torch.library.Library("fastprompt", "DEF")
OPS: dict[str, "Op"] = {}


class Op:
    """One op in every layer: its schemas, their reference, native and Triton implementations, and autograd."""

    def __init__(
        self, name: str, native_first: bool = True, native_for: Callable[..., bool] | None = None
    ) -> None:
        """
        Args:
            native_first: False where PyTorch's reference is faster on this machine's CPU, and so the default.
            native_for: (*arguments) -> True for calls that take the C++ kernel nevertheless.
        """
        self.name = name
        self.native_first = native_first
        self.native_for = native_for
        self.schemas: dict[str, Schema] = {}  # by name, e.g. rms_norm and rms_norm_backward
        self.last_backend: dict[str, str] = {}  # of each schema, and of the op
        self._extra: dict[str, tuple[SimpleNamespace, str]] = {}  # backend -> native kernels, dispatch key
        OPS[name] = self

    def define(self, schema: str, *, check: Function, fake: Function) -> Callable[[Function], Function]:
        """Register ``schema``, its ``fake`` (shapes and dtypes only), and the decorated function as its reference.

        ``check`` may look at everything but what tensors hold: arguments like those of an earlier call pass unseen.
        """

        def fake_of_checked(*args: Any) -> Any:
            check(*args)
            return fake(*args)

        def register(reference: Function) -> Function:
            member = schema.partition("(")[0]
            self.schemas[member] = made = Schema(member, reference, check)
            LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
            LIBRARY.impl(member, self._registered(made, []), "CompositeExplicitAutograd")
            torch.library.register_fake(f"fastprompt::{member}", fake_of_checked, lib=LIBRARY)
            setattr(direct, member, direct_call(self.name, made))
            return reference

        return register

    def native(self, launcher: Function) -> Function:
        """Attach the launcher of the native kernels of the schema it is named after, with a leading underscore."""
        self.schemas[launcher.__name__.removeprefix("_native_")].native = launcher
        return launcher

    def triton(self, launcher: Function) -> Function:
        """Attach the launcher of the Triton kernels of the schema it is named after."""
        self.schemas[launcher.__name__.removeprefix("_triton_")].triton = launcher
        return launcher

    def autograd(self, member: str, *, setup_context: Function, backward: Function) -> None:
        """Give the schema a gradient."""
        function = differentiable(member, setup_context, backward)
        # Function.apply looks at every argument for what torch.func has left behind; direct calls have none.
        self.schemas[member].record = super(torch.autograd.Function, function).apply  # type: ignore[misc]
        LIBRARY.impl(member, autograd_kernel(member, function.apply), "Autograd", with_keyset=True)

    def publish(self) -> None:
        """Register the best backend of this machine for each device. Called once, when the page is complete."""
        for device, names in (("cpu", ("cpu",)), ("cuda", ("cuda", "triton"))):
            here = self.backends(device)
            chosen = [name for name in names if name in here[: here.index("reference")]]
            functions = {name: self._implementation(name) for name in chosen}
            if device == "cpu" and "cpu" in here and not chosen and self.native_for is not None:
                chosen = ["cpu"]
                functions["cpu"] = {
                    member: where(self.native_for, function)
                    for member, function in self._implementation("cpu").items()
                }
            for member, schema in self.schemas.items() if chosen else ():
                found = [(name, functions[name][member]) for name in chosen if member in functions[name]]
                schema.registered[device.upper()] = [self._registered(schema, found)]
                LIBRARY.impl(member, schema.registered[device.upper()][0], device.upper())

    def backends(self, device: str = "cpu") -> list[str]:
        """The backends that this installation has for ``device`` ("cpu" or "cuda"), the default one first.

        Whether there is a GPU is not asked: torch would begin to use it.
        """
        found = []
        if device == "cpu" and _native.CPU_TARGETS:
            found += ["cpu", *(f"cpu:{isa}" for isa in self._isas())]
        if device == "cuda" and hasattr(_native.TARGETS.get("cuda"), self.name):
            found.append("cuda")
        in_triton = any(schema.triton for schema in self.schemas.values()) and _has_triton()
        if device == "cuda" and in_triton:
            found.append("triton")
        found.insert(len(found) if self.native_first or device == "cuda" else 0, "reference")
        if device == "cpu" and in_triton and os.environ.get("TRITON_INTERPRET") == "1":
            found.append("triton")  # interpreted: for tests, never the default
        return found + [name for name, (_, key) in self._extra.items() if key == device.upper()]

    def first_backend(self, member: str, device: str) -> str:
        """What a call on ``device`` ("cpu" or "cuda") tries first now."""
        stack = self.schemas[member].registered.get(device.upper())
        return stack[-1].backends[0] if stack else "reference"

    def add_native_backend(self, backend: str, kernels: SimpleNamespace, key: str) -> None:
        """Offer one more build of the native kernels under dispatch ``key``: the tests' emulated CUDA kernels."""
        self._extra[backend] = (kernels, key)

    @contextmanager
    def use(self, backend: str) -> Iterator[None]:
        devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
        keys = [device.upper() for device in devices if backend in self.backends(device)]
        if not keys:
            available = sorted({name for device in devices for name in self.backends(device)})
            raise ValueError(
                f"fastprompt::{self.name}: backend must be one of {', '.join(available)} here, got {backend!r}"
            )
        scope = torch.library.Library("fastprompt", "IMPL")
        entries: list[tuple[list[Registered], Registered]] = []
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="(?s).*Overriding a previously registered kernel")
                for member, function in self._implementation(backend).items():
                    for key in keys:
                        registered = self._registered(self.schemas[member], [(backend, function)])
                        scope.impl(member, registered, key, allow_override=True)
                        stack = self.schemas[member].registered.setdefault(key, [])
                        stack.append(registered)
                        entries.append((stack, registered))
            yield
        finally:
            for stack, registered in entries:
                stack.remove(registered)
            scope._destroy()

    def _implementation(self, backend: str) -> dict[str, Function]:
        if backend == "reference":
            return {member: schema.reference for member, schema in self.schemas.items()}
        if backend == "triton":
            return {member: schema.triton for member, schema in self.schemas.items() if schema.triton}
        if backend in self._extra:
            return self._launchers(self._extra[backend][0])
        if backend == "cuda":
            functions = self._launchers(_native.TARGETS["cuda"])
            return {member: where_tensors_are(function) for member, function in functions.items()}
        isa = backend.partition(":")[2] or self._isas()[0]
        functions = self._launchers(_native.TARGETS[isa])
        if isa in _native.BF16_ISAS:
            own = {name: run for name, run in functions.items() if hasattr(_native.TARGETS[isa], name)}
            functions = self._launchers(_native.TARGETS["avx512"])
            functions |= {name: either(run, functions[name]) for name, run in own.items()}
        return functions

    def _launchers(self, kernels: SimpleNamespace) -> dict[str, Function]:
        return {
            member: partial(schema.native, kernels)
            for member, schema in self.schemas.items()
            if schema.native
        }

    def _isas(self) -> list[str]:
        """The instruction sets that this CPU has and the op has a kernel for, best first."""
        return [isa for isa in _native.CPU_TARGETS if hasattr(_native.TARGETS[isa], self.name)]

    def _registered(self, schema: Schema, choices: list[tuple[str, Function]]) -> Registered:
        return Registered(schema, choices, self._note)

    def _note(self, schema: Schema, backend: str) -> None:
        self.last_backend[schema.name] = backend
        if schema.record:
            self.last_backend[self.name] = backend


def registered_for(member: str, key: str) -> Registered:
    """What the dispatcher calls for the schema ``member`` under the device's key ("CPU", "CUDA")."""
    owner = next(each for each in OPS.values() if member in each.schemas)
    schema = owner.schemas[member]
    found = schema.registered.get(key)
    return found[-1] if found else owner._registered(schema, [])


def chosen() -> tuple[tuple[str, ...], ...]:
    """The backends of all schemas and devices, which use_backend changes."""
    schemas = (schema for op in OPS.values() for schema in op.schemas.values())
    every = (stack for schema in schemas for stack in schema.registered.values() if stack)
    return tuple(tuple(stack[-1].backends) for stack in every)


def _has_triton() -> bool:
    """Triton, and our kernels: these are part of the package only where it is installed."""
    return all(importlib.util.find_spec(name) for name in ("triton", "fastprompt.triton_kernels"))

# SPDX-License-Identifier: Apache-2.0
"""The op pattern: how one page in ``fastprompt/ops`` becomes dispatcher ops with a backend per device.

A page creates one :class:`Op` and attaches to it, for every schema it defines (a forward and its backward, say):

- ``op.define(schema, check=..., fake=...)`` on the readable reference, which serves every device that has nothing
  better. ``check`` raises where the arguments do not fit, ``fake`` makes empty results; all implementations come after
  ``check`` and trust what it has seen;
- ``op.native`` on the launcher of the C++ and CUDA kernels: ``(kernels, *arguments)``. CPU and CUDA kernels of one
  name have one signature, so a page needs one launcher for every instruction set and the GPU;
- ``op.triton`` on the launcher of the Triton kernels: ``(*arguments)``;
- ``op.autograd(...)``.

torch's dispatcher is the registry: what runs is what is registered under the tensors' device. :func:`use_backend`
registers another implementation for a scope. A launcher returns ``NotImplemented`` for a case that its kernel does
not cover (float64, say); the device's next backend or at last the reference then runs, as :func:`backend_used` tells.
"""

import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.overrides import is_tensor_like
from torch.utils._pytree import tree_leaves

from fastprompt import _native
from fastprompt._plain import is_below_autograd, is_plain_call, plain_device

LIBRARY = torch.library.Library("fastprompt", "DEF")
OPS: dict[str, "Op"] = {}
MOST_KNOWN = 1024  # descriptions of a schema's arguments, of some hundred bytes each
direct = SimpleNamespace()  # the schemas by name, as this package calls them: see _direct

Function = Callable[..., Any]


class Op:
    """One op in every layer: its schemas, their reference, native and Triton implementations, and autograd."""

    def __init__(
        self, name: str, native_first: bool = True, native_for: Callable[..., bool] | None = None
    ) -> None:
        """native_first=False: on this machine's CPU the reference is faster, and so the default; but not for arguments
        that ``native_for`` is true of.
        """
        self.name = name
        self.native_first = native_first
        self.native_for = native_for
        self.members: list[str] = []  # schema names, e.g. rms_norm and rms_norm_backward
        self.last_backend: dict[str, str] = {}
        # Schemas with a gradient, such as rms_norm and rms_norm_residual, and what records it: see _differentiable.
        self._forward: dict[str, Function] = {}
        self._reference: dict[str, Function] = {}
        self._check: dict[str, Function] = {}
        # Descriptions of arguments that have passed the check, and their device's dispatch key: see _direct.
        self._known: dict[str, dict[bytes, str]] = {}
        self._native: dict[str, Function] = {}
        self._triton: dict[str, Function] = {}
        self._extra: dict[str, tuple[SimpleNamespace, str]] = {}  # backend -> native kernels, dispatch key
        # What is registered, the last one on top: (schema name, dispatch key).
        self._running: dict[tuple[str, str], list[Function]] = {}
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
            self.members.append(member)
            self._reference[member], self._check[member], self._known[member] = reference, check, {}
            LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
            LIBRARY.impl(
                member, self._recorded(member, ("reference", reference)), "CompositeExplicitAutograd"
            )
            torch.library.register_fake(f"fastprompt::{member}", fake_of_checked, lib=LIBRARY)
            setattr(direct, member, _direct(self, member))
            return reference

        return register

    def native(self, launcher: Function) -> Function:
        """Attach the launcher of the native kernels of the schema it is named after, with a leading underscore."""
        self._native[launcher.__name__.removeprefix("_native_")] = launcher
        return launcher

    def triton(self, launcher: Function) -> Function:
        """Attach the launcher of the Triton kernels of the schema it is named after."""
        self._triton[launcher.__name__.removeprefix("_triton_")] = launcher
        return launcher

    def autograd(self, member: str, *, setup_context: Function, backward: Function) -> None:
        """Give the schema a gradient: as ``torch.library.register_autograd``, at a third of its cost per call.

        That function asks the schema for default values on every call, which takes longer than a small kernel; the
        schemas here have none.
        """
        function = _differentiable(member, setup_context, backward)
        # Function.apply looks at every argument for what torch.func has left behind; direct calls have none.
        self._forward[member] = super(torch.autograd.Function, function).apply  # type: ignore[misc]
        LIBRARY.impl(member, _autograd_kernel(member, function.apply), "Autograd", with_keyset=True)

    def publish(self) -> None:
        """Register the best backend of this machine for each device. Called once, when the page is complete."""
        for device, names in (("cpu", ("cpu",)), ("cuda", ("cuda", "triton"))):
            here = self.backends(device)
            chosen = [name for name in names if name in here[: here.index("reference")]]
            functions = {name: self._implementation(name) for name in chosen}
            if device == "cpu" and "cpu" in here and not chosen and self.native_for is not None:
                chosen = ["cpu"]
                functions["cpu"] = {
                    member: _where(self.native_for, function)
                    for member, function in self._implementation("cpu").items()
                }
            for member in self.members if chosen else ():
                found = [(name, functions[name][member]) for name in chosen if member in functions[name]]
                function = self._recorded(member, *found)
                self._running[member, device.upper()] = [function]
                LIBRARY.impl(member, function, device.upper())

    def backends(self, device: str = "cpu") -> list[str]:
        """The backends that this installation has for ``device`` ("cpu" or "cuda"), the default one first.

        Whether there is a GPU is not asked: torch would begin to use it.
        """
        found = []
        if device == "cpu" and self._native and _native.CPU_TARGETS:
            found += ["cpu", *(f"cpu:{isa}" for isa in self._isas())]
        if device == "cuda" and self._native and hasattr(_native.TARGETS.get("cuda"), self.name):
            found.append("cuda")
        if device == "cuda" and self._triton and _has_triton():
            found.append("triton")
        found.insert(len(found) if self.native_first or device == "cuda" else 0, "reference")
        if device == "cpu" and self._triton and _has_triton() and os.environ.get("TRITON_INTERPRET") == "1":
            found.append("triton")  # interpreted: for tests, never the default
        return found + [name for name, (_, key) in self._extra.items() if key == device.upper()]

    def first_backend(self, member: str, device: str) -> str:
        """What a call on ``device`` ("cpu" or "cuda") tries first now."""
        running = self._running.get((member, device.upper()))
        return running[-1].backends[0] if running else "reference"  # type: ignore[attr-defined]

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
        entries: list[tuple[list[Function], Function]] = []
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="(?s).*Overriding a previously registered kernel")
                for member, function in self._implementation(backend).items():
                    for key in keys:
                        recorded = self._recorded(member, (backend, function))
                        scope.impl(member, recorded, key, allow_override=True)
                        running = self._running.setdefault((member, key), [])
                        running.append(recorded)
                        entries.append((running, recorded))
            yield
        finally:
            for running, recorded in entries:
                running.remove(recorded)
            scope._destroy()

    def _implementation(self, backend: str) -> dict[str, Function]:
        if backend == "reference":
            return self._reference
        if backend == "triton":
            return self._triton
        if backend in self._extra:
            return self._launchers(self._extra[backend][0])
        if backend == "cuda":
            functions = self._launchers(_native.TARGETS["cuda"])
            return {member: _where_tensors_are(function) for member, function in functions.items()}
        isa = backend.partition(":")[2] or self._isas()[0]
        functions = self._launchers(_native.TARGETS[isa])
        if isa in _native.BF16_ISAS:
            own = {name: run for name, run in functions.items() if hasattr(_native.TARGETS[isa], name)}
            functions = self._launchers(_native.TARGETS["avx512"])
            functions |= {name: _either(run, functions[name]) for name, run in own.items()}
        return functions

    def _launchers(self, kernels: SimpleNamespace) -> dict[str, Function]:
        return {member: partial(launcher, kernels) for member, launcher in self._native.items()}

    def _isas(self) -> list[str]:
        """The instruction sets that this CPU has and the op has a kernel for, best first."""
        return [isa for isa in _native.CPU_TARGETS if hasattr(_native.TARGETS[isa], self.name)]

    def _recorded(self, member: str, *choices: tuple[str, Function]) -> Function:
        """The first of the (backend, function) pairs that covers the arguments, else the reference; ``unchecked``
        without a look at them.
        """
        every = (*choices, ("reference", self._reference[member]))

        def run(*args: Any) -> Any:
            self._check[member](*args)
            return unchecked(*args)

        def unchecked(*args: Any) -> Any:
            _native.take_torchs_threads()
            for backend, function in every:
                result = function(*args)
                if result is not NotImplemented:
                    self.last_backend[member] = backend
                    if member in self._forward:
                        self.last_backend[self.name] = backend
                    return result
            raise AssertionError("the reference, which comes last, covers everything")

        run.unchecked = unchecked  # type: ignore[attr-defined]
        run.backends = [backend for backend, _ in choices]  # type: ignore[attr-defined]
        return run


def _either(first: Function, second: Function) -> Function:
    """``second`` for what ``first`` does not cover."""

    def run(*args: Any) -> Any:
        result = first(*args)
        return second(*args) if result is NotImplemented else result

    return run


def _where(condition: Callable[..., bool], function: Function) -> Function:
    """``function`` for arguments that the condition is true of."""

    def run(*args: Any) -> Any:
        return function(*args) if condition(*args) else NotImplemented

    return run


def _where_tensors_are(function: Function) -> Function:
    """``function`` with its tensors' GPU as the current one, to which the CUDA runtime launches."""

    def run(*args: Any) -> Any:
        device = next(x.device for x in args if isinstance(x, torch.Tensor))
        if not _native.is_elsewhere(device):
            return function(*args)
        with torch.cuda.device(device):
            return function(*args)

    return run


def use_backend(op: str, backend: str) -> AbstractContextManager[None]:
    """Run ``op`` on ``backend`` inside a ``with`` block, in the whole process.

    Args:
        op: a name from ``fastprompt.ops``, e.g. ``"rms_norm"``; its backward is switched with it.
        backend: ``"reference"``, ``"cpu"`` or one instruction set of it (``"cpu:scalar"``, ``"cpu:avx2"``,
            ``"cpu:avx512"``, ``"cpu:avx512_bf16"``, ``"cpu:amx"``, ``"cpu:neon"``), ``"cuda"`` or ``"triton"``.

    Raises:
        ValueError: there is no such op, or the backend cannot run on this machine; the message lists what can.
    """
    return _find(op).use(backend)


def backend_used(op: str) -> str | None:
    """The backend that last ran ``op``, or a part of it such as ``"rms_norm_backward"``; None before the first run.

    Raises:
        ValueError: there is no such op.
    """
    for owner in OPS.values():
        if op in owner.members:
            return owner.last_backend.get(op)
    raise ValueError(f"fastprompt: op must be one of {', '.join(sorted(OPS))} or a part of one, got {op!r}")


def backends(op: str, device: str | torch.device = "cpu") -> list[str]:
    """The backends of ``op`` that this installation has for ``device`` (a CPU or "cuda"; there need not be a GPU), the
    default first.

    Raises:
        ValueError: there is no such op, or the device is of another type.
    """
    owner = _find(op)
    try:
        kind = torch.device(device).type
    except (RuntimeError, TypeError):
        kind = ""
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"fastprompt::{op}: device must be cpu or cuda, got {device!r}")
    return owner.backends(kind)


def running(member: str, key: str) -> Function:
    """What the dispatcher calls for the schema ``member`` under the device's key ("CPU", "CUDA")."""
    owner = next(each for each in OPS.values() if member in each.members)
    found = owner._running.get((member, key))
    return found[-1] if found else owner._recorded(member)


def chosen() -> tuple[tuple[str, ...], ...]:
    """The backends of all schemas and devices, which use_backend changes."""
    every = (found for op in OPS.values() for found in op._running.values() if found)
    return tuple(tuple(found[-1].backends) for found in every)  # type: ignore[attr-defined]


def _find(op: str) -> Op:
    if op not in OPS:
        raise ValueError(f"fastprompt: op must be one of {', '.join(sorted(OPS))}, got {op!r}")
    return OPS[op]


def _differentiable(member: str, setup_context: Function, backward: Function) -> Any:
    """The schema as an autograd function, to be applied to ``(*inputs, run)``: ``run(*inputs)`` computes the output."""

    def forward(ctx: Any, *args: Any) -> Any:
        *inputs, run = args
        with torch._C._AutoDispatchBelowAutograd():
            output = run(*inputs)
        setup_context(ctx, inputs, output)
        return output

    def backward_with_run(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        if torch.is_grad_enabled():  # with create_graph=True: the gradient would pass for a constant
            remedy = "call backward without create_graph"
            raise RuntimeError(f"fastprompt::{member}: has no second derivative: {remedy}")
        return (*backward(ctx, *grads), None)

    functions = {"forward": staticmethod(forward), "backward": staticmethod(backward_with_run)}
    return type(f"fastprompt_{member}", (torch.autograd.Function,), functions)


def _autograd_kernel(member: str, record: Function) -> Function:
    """What runs under the dispatcher's Autograd key; ``keys`` are those of the call, of which it hands on the rest."""
    overload = getattr(torch.ops.fastprompt, member).default
    after = torch._C._after_autograd_keyset

    def run(keys: Any, *inputs: Any) -> Any:
        if forward_ad._current_level >= 0 and any(map(_has_tangent, tree_leaves(inputs))):
            raise NotImplementedError(f"fastprompt::{member}: has no forward-mode derivative: use backward")
        below = partial(overload.redispatch, keys & after)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
            if torch._C._are_functorch_transforms_active():
                raise NotImplementedError(
                    f"fastprompt::{member}: has no derivative inside torch.func: use backward or torch.autograd.grad"
                )
            return record(*inputs, below)
        with torch._C._AutoDispatchBelowAutograd():
            return below(*inputs)

    return run


def _direct(op: Op, member: str) -> Function:
    """The schema as this package calls it: where the device alone decides what runs, without the dispatcher, which
    keeps the host busy for as long as a small kernel takes, and whose errors know no remedy.
    """
    overload, running = getattr(torch.ops.fastprompt, member).default, op._running
    kinds = [(i, each.name, str(each.type)) for i, each in enumerate(overload._schema.arguments)]
    tensors = [(i, name, kind) for i, name, kind in kinds if "Tensor" in kind]
    others = [i for i, _, kind in kinds if "Tensor" not in kind]  # of which the dispatcher makes numbers

    def call(*args: Any) -> Any:
        if not is_plain_call():
            tensors_of(args)
            return overload(*args)
        record = None
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args) and not is_below_autograd():
            record = op._forward.get(member)
            if record is None:
                return overload(*args)
        described, known = _native.describe(*args), op._known[member]
        found = running.get((member, known.get(described, ""))) if described is not None else None
        new = None
        if found:
            run = found[-1].unchecked  # type: ignore[attr-defined]
        else:
            new = plain_device(tensors_of(args))
            found = running.get((member, new))
            if not found or any(isinstance(args[i], torch.Tensor) for i in others):
                return overload(*args)
            run = found[-1]
        if torch._C._len_torch_function_stack() > 0:
            run = _quietly(run)
        result = record(*args, run) if record else run(*args)
        if new is not None and described is not None:
            if len(known) >= MOST_KNOWN:
                known.clear()
            known[described] = new
        return result

    def tensors_of(args: tuple[Any, ...]) -> list[torch.Tensor]:
        given = []
        for i, name, kind in tensors:
            value = args[i]
            if value is None and kind == "Optional[Tensor]":
                continue
            for each in value if kind == "List[Tensor]" else (value,):
                if not isinstance(each, torch.Tensor) and not is_tensor_like(each):  # as torch.fx hands on
                    got = type(each).__name__
                    raise TypeError(f"fastprompt::{op.name}: {name} must be a torch.Tensor, got {got}")
                given.append(each)
        return given

    return call


def _quietly(run: Function) -> Function:
    """``run`` without default devices: a launcher has no need of them, and every look at a tensor would ask them."""

    def quiet(*args: Any) -> Any:
        with torch._C.DisableTorchFunction():
            return run(*args)

    return quiet


def _has_tangent(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and forward_ad.unpack_dual(x).tangent is not None


def _has_triton() -> bool:
    """Triton, and our kernels: these are part of the package only where it is installed."""
    return all(importlib.util.find_spec(name) for name in ("triton", "fastprompt.triton_kernels"))

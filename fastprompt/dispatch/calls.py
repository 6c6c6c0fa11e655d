# SPDX-License-Identifier: Apache-2.0
"""How this package calls its own ops.

Where only the tensors' device decides what runs, a call goes straight to that backend: torch's dispatcher takes the
host as long as a small kernel, and its errors name no remedy (docs/decisions/0015).
"""

from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import is_tensor_like

from fastprompt import _native
from fastprompt.dispatch.plain import is_below_autograd, is_plain_call, plain_device
from fastprompt.dispatch.schema import Function, Schema

MOST_KNOWN = 1024  # descriptions of a schema's arguments, of some hundred bytes each
direct = SimpleNamespace()  # by name: direct.rms_norm_backward(dy, x, w, rstd)


def direct_call(op: str, schema: Schema) -> Function:
    """The function that ``direct`` has for a schema of the op."""
    overload, registered = getattr(torch.ops.fastprompt, schema.name).default, schema.registered
    kinds = [(i, each.name, str(each.type)) for i, each in enumerate(overload._schema.arguments)]
    tensors = [(i, name, kind) for i, name, kind in kinds if "Tensor" in kind]
    others = [i for i, _, kind in kinds if "Tensor" not in kind]  # of which the dispatcher makes numbers

    def call(*args: Any) -> Any:
        if not is_plain_call():
            tensors_of(args)
            return overload(*args)
        record = None
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args) and not is_below_autograd():
            record = schema.record
            if record is None:
                return overload(*args)
        described, known = _native.describe(*args), schema.known
        found = registered.get(known.get(described, "")) if described is not None else None
        new = None
        if found:
            run: Function = found[-1].unchecked
        else:
            new = plain_device(tensors_of(args))
            found = registered.get(new)
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
                    raise TypeError(f"fastprompt::{op}: {name} must be a torch.Tensor, got {got}")
                given.append(each)
        return given

    return call


def _quietly(run: Function) -> Function:
    """``run`` without default devices: a launcher has no need of them, and every look at a tensor would ask them."""

    def quiet(*args: Any) -> Any:
        with torch._C.DisableTorchFunction():
            return run(*args)

    return quiet

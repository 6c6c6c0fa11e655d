# SPDX-License-Identifier: Apache-2.0
"""A schema's gradient: as ``torch.library.register_autograd``, at a third of its cost per call.

That function asks the schema for default values on every call, which takes longer than a small kernel; the schemas
here have none.
"""

from functools import partial
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves

from fastprompt.dispatch.schema import Function


def differentiable(member: str, setup_context: Function, backward: Function) -> Any:
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


def autograd_kernel(member: str, record: Function) -> Function:
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


def _has_tangent(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and forward_ad.unpack_dual(x).tangent is not None

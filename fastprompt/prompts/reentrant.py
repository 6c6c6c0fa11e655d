# SPDX-License-Identifier: Apache-2.0
"""Gradients of prompt keys under reentrant checkpointing.

A reentrant checkpoint gives gradients to its tensor arguments only. Prompt keys reach the layers another way, so its
inner backward would walk on into their graph, once per layer and too early. They are handed over as leaves instead,
which gather what every layer adds; a node in front of the stack, whose backward runs after all of them, passes it on.
That node's output also requires a gradient, without which a checkpoint of a frozen stack computes none.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastprompt._allowed import PromptKeys


def is_reentrant(stack: Any) -> bool:
    """Is this stack to be checkpointed in the reentrant way?"""
    for block in stack.block:
        if getattr(block, "gradient_checkpointing", False) and block.training:
            return bool(block._gradient_checkpointing_func.keywords.get("use_reentrant", True))
    return False


def _gathered(x: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """x, the input of a stack, and leaves in place of ``tensors``, whose gradients x brings back."""
    leaves = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in tensors]
    return _Gather.apply(x, leaves, *tensors), leaves


def as_leaves(embeds: Tensor, *sites: PromptKeys | None) -> tuple[Tensor, list[PromptKeys | None]]:
    """The stack's input and its prompt keys, made ready for reentrant checkpoints."""
    tensors = [tensor for site in sites if site is not None for tensor in (*site.keys, *site.values)]
    if not tensors:
        return embeds, list(sites)
    embeds, leaves = _gathered(embeds, tensors)
    found: list[PromptKeys | None] = []
    for site in sites:
        if site is None:
            found.append(None)
            continue
        layers = len(site.keys)
        keys, values, leaves = leaves[:layers], leaves[layers : 2 * layers], leaves[2 * layers :]
        found.append(site._replace(keys=tuple(keys), values=tuple(values)))
    return embeds, found


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, leaves: list[Tensor], *tensors: Tensor) -> Tensor:
        ctx.leaves = leaves
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grads = [leaf.grad for leaf in ctx.leaves]
        for leaf in ctx.leaves:
            leaf.grad = None
        return dx, None, *grads

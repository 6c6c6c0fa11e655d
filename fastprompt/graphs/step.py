# SPDX-License-Identifier: Apache-2.0
"""The loss of a batch and its gradients as one CUDA graph, recorded once per shape."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fastprompt.graphs.recording import RECORDING, Pool, padded


class RecordedStep:
    """A graph, with the tensors that it reads and writes."""

    def __init__(
        self,
        model: nn.Module,
        batch: dict[str, Any],
        tensors: dict[str, Tensor],
        leaves: list[nn.Parameter],
        pool: Pool,
    ) -> None:
        self.inputs = {
            name: x.detach().clone().requires_grad_(x.requires_grad) for name, x in tensors.items()
        }
        aliases = {leaf: nn.Parameter(leaf.detach()) for leaf in leaves}
        wanted = [x for x in (*self.inputs.values(), *aliases.values()) if x.requires_grad]

        def run() -> tuple[Tensor, tuple[Tensor | None, ...]]:
            loss = loss_of(model, batch | self.inputs)
            return loss.detach(), torch.autograd.grad(loss, wanted, allow_unused=True)

        with RECORDING, padded(model), replaced(model, aliases):
            self.recording = pool.record(model, run, next(iter(tensors.values())).device)

    def replay(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, list[Tensor | None]]:
        """The loss of these inputs, and the gradients of what requires one, as tensors of their own."""
        for static, x in zip(self.inputs.values(), inputs, strict=True):
            static.detach().copy_(x)
        loss, gradients = self.recording.replay()
        return loss.clone(), [None if each is None else each.clone() for each in gradients]


class ReplayedStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recorded: RecordedStep, *tensors: Tensor) -> Tensor:
        """tensors: the inputs, then the parameters, for autograd to see."""
        loss, ctx.gradients = recorded.replay(tensors[: len(recorded.inputs)])
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        gradients = iter(ctx.gradients)
        found = (next(gradients) if needed else None for needed in ctx.needs_input_grad[1:])
        return None, *(None if each is None else each * dloss for each in found)


def check_batch(batch: dict[str, Any]) -> None:
    """A graph would read what was inside another object when it was recorded."""
    for name, value in batch.items():
        inside = [] if isinstance(value, Tensor) else tree_leaves(value)
        if any(isinstance(each, Tensor) for each in inside):
            got = f"a {type(value).__name__} with some inside"
            raise ValueError(f"fastprompt.graphed: {name} must be a tensor or hold none, got {got}")


def loss_of(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    loss: Tensor | None = getattr(model(**batch), "loss", None)
    if loss is None:
        raise ValueError(
            f"fastprompt.graphed: the output of {type(model).__name__} has no loss. Pass labels in the batch, and leave"
            " return_dict on"
        )
    return loss


@contextmanager
def replaced(model: nn.Module, aliases: dict[nn.Parameter, nn.Parameter]) -> Iterator[None]:
    """Put each parameter's alias, of the same memory, in its place.

    The autograd node in which a parameter's gradient arrives waits on the stream where the parameter was used first,
    and a graph being recorded may wait for no stream outside.
    """
    owners = [
        (module._parameters, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter in aliases
    ]
    for parameters, name, parameter in owners:
        parameters[name] = aliases[parameter]
    try:
        yield
    finally:
        for parameters, name, parameter in owners:
            parameters[name] = parameter

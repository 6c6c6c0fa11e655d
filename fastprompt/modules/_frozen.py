# SPDX-License-Identifier: Apache-2.0
"""What the sublayers share: when a layer's tensors can be read directly, and the pieces of its backward."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from fastprompt._hooks import has_global_hooks, is_hooked
from fastprompt._op import direct
from fastprompt._plain import is_transformed
from fastprompt.ops._checks import FLOATS
from fastprompt.ops.frozen_linear import pays, pays_backward, product, product_sum

Modules = Mapping[str, Any]
Inputs = tuple[Tensor, ...]


def obstacle(
    children: Modules, others: Modules = MappingProxyType({}), inputs: Inputs | None = None
) -> str | None:
    """Why the linear layers and norms ``children`` cannot be computed from their weights alone; None if they can.

    A LoRA or quantised layer is another class or weight, an offloaded one has hooks or a meta weight; a weight that
    trains needs a gradient that the fused layers do not compute. ``others`` are modules without weights of their own
    that are not called either: dropout, activation, what holds the children. ``inputs`` of a call; None: of training.
    """
    return _examine(children, others, inputs)[1]


def ready(children: Modules, others: Modules, *inputs: Tensor) -> dict[str, Tensor] | None:
    """The children's weights, if the fused layer may run on these inputs."""
    weights, found = _examine(children, others, inputs)
    if found is not None or torch.is_autocast_enabled(inputs[0].device.type) or is_followed():
        return None
    weight = next(iter(weights.values()))
    for x in inputs:
        if x.dtype != weight.dtype or x.device != weight.device:
            return None
    return weights


def is_followed() -> bool:
    """Does something follow each operation or module that does not know the fused layers: a transform, hooks on all?"""
    return is_transformed() or (has_global_hooks() and not torch.compiler.is_compiling())


def _examine(
    children: Modules, others: Modules, inputs: Inputs | None
) -> tuple[dict[str, Tensor], str | None]:
    """Asked by every fused layer at every call: of dictionaries, as nn.Module's own lookup would take the longest."""
    weights: dict[str, Tensor] = {}
    dtype = None
    for name, child in children.items():
        cls = type(child)
        if not _has_stock_weight(cls):
            return weights, f"{name} is a {cls.__name__}"
        weight = _tensor(child, "weight")
        if type(weight) is not nn.Parameter and type(weight) is not Tensor:
            return weights, f"{name}.weight is a {type(weight).__name__}"
        if _tensor(child, "bias") is not None:
            return weights, f"{name} has a bias"
        if weight.requires_grad and not is_evaluated(child, inputs):
            return weights, f"{name}.weight is trained"
        if weight.is_meta or is_hooked(child):
            return weights, f"{name} has hooks"
        found = weight.dtype
        if found is not dtype:
            if found not in FLOATS:
                return weights, f"{name}.weight is {found}"
            if dtype is not None:
                return weights, f"{name}.weight is {found}, others are {dtype}"
            dtype = found
        weights[name] = weight
    for name, child in others.items():
        if not is_stock(type(child)):
            return weights, f"{name} is a {type(child).__name__}"
        if is_hooked(child):
            return weights, f"{name} has hooks"
    return weights, None


def _has_stock_weight(cls: type) -> bool:
    norm = cls.__name__.endswith("LayerNorm") and cls.__module__.startswith("transformers.models.")
    return cls is nn.Linear or "stock_class" in vars(cls) or norm


def is_stock(cls: type) -> bool:
    """Is a module without weights of its own what transformers or torch made it?"""
    stock = ("transformers.models.", "transformers.activations", "torch.nn.modules.activation")
    return cls is nn.Dropout or "stock_class" in vars(cls) or cls.__module__.startswith(stock)


def is_evaluated(module: nn.Module, inputs: Inputs | None) -> bool:
    """Will nobody want a gradient of its weights in a call on these inputs? None: the question is of training.

    The first run of a reentrant checkpoint records none; the second will, and is to draw the same dropout masks. In
    training mode, or of inputs that require a gradient, this may be a first run. What is exported may run anywhere.
    """
    if inputs is None or torch.is_grad_enabled() or module.training:
        return False
    return not (any(x.requires_grad for x in inputs) or torch.compiler.is_exporting())


def _tensor(module: nn.Module, name: str) -> Any:
    """Its parameter, buffer or attribute, or None."""
    own = module.__dict__
    found = own["_parameters"].get(name)
    if found is None:
        found = own["_buffers"].get(name) if own["_buffers"] else None
    return own.get(name) if found is None else found


def rate(dropout: nn.Dropout) -> float:
    """The probability that this module drops with now."""
    return dropout.p if dropout.training else 0.0


def add(x: Tensor, residual: Tensor, seed: Tensor | None, p: float) -> Tensor:
    """residual + dropout(x); x is given up."""
    if p > 0.0:
        return direct.dropout_add(x, residual, seed, p)
    # Under PyTorch 2.11's compiler what a layer writes to and returns gets a gradient of zero.
    return x + residual if torch.compiler.is_compiling() else x.add_(residual)


def dropped(dy: Tensor, seed: Tensor | None, p: float) -> Tensor:
    """The gradient of x in ``add``."""
    return direct.dropout_add(dy, None, seed, p) if p > 0.0 else dy


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """function.apply; where nothing can want a gradient its forward alone, for a layer's tenth of the host's time."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return function.apply(*args)
    return function.forward(None, *args)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T. A GPU runs the reference in any case: without the op, which keeps the host busy."""
    y: Tensor = (direct.frozen_linear if not x.is_cuda and pays(x, weight) else product)(x, weight)
    return y


def products(*pairs: tuple[Tensor, Tensor]) -> Tensor:
    """The sum of grad @ weight over the pairs, accumulated in the products: [..., N], [N, K] -> [..., K]."""
    grads, weights = (list(each) for each in zip(*pairs, strict=True))
    own = not grads[0].is_cuda and pays_backward(grads[0])
    total: Tensor = (direct.frozen_linear_backward if own else product_sum)(grads, weights)
    return total


def norm_gradient(dn: Tensor, dy: Tensor, x: Tensor, w: Tensor, rstd: Tensor) -> Tensor:
    """The gradient of x in x + f(norm(x)), given those of norm(x) and of the sum."""
    return direct.rms_norm_backward(dn, x, w, rstd).add_(dy)

# SPDX-License-Identifier: Apache-2.0
"""What the sublayers share: when a layer's tensors can be read directly, and the pieces of its backward."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastprompt._op import direct as ops
from fastprompt.ops._checks import FLOATS
from fastprompt.ops.frozen_linear import ROWS, product, product_sum


def obstacle(children: Mapping[str, Any]) -> str | None:
    """Why these linear layers and norms cannot be computed from their weights alone; None if they can.

    A LoRA or quantised layer is another class or weight, an offloaded one has hooks or a meta weight; a weight that
    trains needs a gradient that the fused layers do not compute.
    """
    dtype = None
    for name, child in children.items():
        cls = type(child)
        stock = cls is nn.Linear or hasattr(cls, "stock_class") or cls.__name__.endswith("LayerNorm")
        if not stock:
            return f"{name} is a {cls.__name__}"
        weight = _tensor(child, "weight")
        if type(weight) not in (nn.Parameter, Tensor) or weight is None:
            return f"{name}.weight is a {type(weight).__name__}"
        if _tensor(child, "bias") is not None:
            return f"{name} has a bias"
        if weight.requires_grad:
            return f"{name}.weight is trained"
        if weight.is_meta or is_hooked(child):
            return f"{name} has hooks"
        if weight.dtype not in FLOATS:
            return f"{name}.weight is {weight.dtype}"
        if dtype is not None and weight.dtype != dtype:
            return f"{name}.weight is {weight.dtype}, others are {dtype}"
        dtype = weight.dtype
    return None


def _tensor(module: nn.Module, name: str) -> Any:
    """Its parameter, buffer or attribute, or None. nn.Module's own lookup would take longer than all else here."""
    if hasattr(type(module), name):  # a property
        return getattr(module, name)
    for group in (module._parameters, module._buffers, module.__dict__):
        found = group.get(name)
        if found is not None:
            return found
    return None


def is_hooked(module: nn.Module) -> bool:
    """Is something else called with it than its class's forward?"""
    return bool("forward" in module.__dict__ or module._forward_hooks or module._forward_pre_hooks)


def ready(children: Mapping[str, Any], *inputs: Tensor) -> bool:
    """May the fused layer run on these inputs?"""
    if obstacle(children) is not None or torch.is_autocast_enabled(inputs[0].device.type):
        return False
    weight = next(iter(children.values())).weight
    return all(x.dtype == weight.dtype and x.device == weight.device for x in inputs)


def rate(dropout: nn.Dropout) -> float:
    """The probability that this module drops with now."""
    return dropout.p if dropout.training else 0.0


def add(x: Tensor, residual: Tensor, seed: Tensor | None, p: float) -> Tensor:
    """residual + dropout(x); x is given up."""
    if p > 0.0:
        return ops.dropout_add(x, residual, seed, p)
    # Under PyTorch 2.11's compiler what a layer writes to and returns gets a gradient of zero.
    return x + residual if torch.compiler.is_compiling() else x.add_(residual)


def dropped(dy: Tensor, seed: Tensor | None, p: float) -> Tensor:
    """The gradient of x in ``add``."""
    return ops.dropout_add(dy, None, seed, p) if p > 0.0 else dy


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """function.apply; where nothing can want a gradient its forward alone, for a layer's tenth of the host's time."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return function.apply(*args)
    return function.forward(None, *args)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T. A GPU and a few rows run the reference in any case: without the op, which keeps the host busy."""
    few = x.numel() < ROWS * x.shape[-1]
    y: Tensor = (product if x.is_cuda or few else ops.frozen_linear)(x, weight)
    return y


def products(*pairs: tuple[Tensor, Tensor]) -> Tensor:
    """The sum of grad @ weight over the pairs, accumulated in the products: [..., N], [N, K] -> [..., K]."""
    grads, weights = (list(each) for each in zip(*pairs, strict=True))
    total: Tensor = (product_sum if grads[0].is_cuda else ops.frozen_linear_backward)(grads, weights)
    return total


def norm_gradient(dn: Tensor, dy: Tensor, x: Tensor, w: Tensor, rstd: Tensor) -> Tensor:
    """The gradient of x in x + f(norm(x)), given those of norm(x) and of the sum."""
    return ops.rms_norm_backward(dn, x, w, rstd).add_(dy)

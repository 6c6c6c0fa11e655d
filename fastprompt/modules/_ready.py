# SPDX-License-Identifier: Apache-2.0
"""When a layer's tensors can be read directly, in place of calling the modules that hold them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastprompt._hooks import has_global_hooks, is_hooked
from fastprompt.dispatch.plain import PLAIN_TYPES, is_transformed
from fastprompt.ops._checks import FLOATS
from fastprompt.ops.t5_attention import HEAD_WIDTHS

Modules = Mapping[str, Any]

_NO_MODULES: Modules = {}  # torch.compile takes no MappingProxyType where keywords were written to before

_STOCK_MODULES = ("transformers.models.", "transformers.activations", "torch.nn.modules.activation")


def obstacle(
    children: Modules, others: Modules = _NO_MODULES, inputs: tuple[Tensor, ...] | None = None
) -> str | None:
    """Why the linear layers and norms ``children`` cannot be computed from their weights alone; None if they can.

    A LoRA or quantised layer is another class or weight, an offloaded one has hooks or a meta weight; a weight that
    trains needs a gradient that the fused layers do not compute. ``others`` are modules without weights of their own
    that are not called either: dropout, activation, what holds the children. ``inputs`` of a call; None: of training.
    """
    return _examine(children, others, inputs)[1]


def head_obstacle(attention: Any) -> str | None:
    """Why kernels do not compute what its heads do; None if they do."""
    if attention.key_value_proj_dim not in HEAD_WIDTHS:
        widths = ", ".join(map(str, HEAD_WIDTHS))
        return f"its heads are {attention.key_value_proj_dim} wide, kernels take {widths}"
    scaling = getattr(attention, "scaling", 1.0)
    return None if scaling == 1.0 else f"its scores are scaled by {scaling}"


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
    children: Modules, others: Modules, inputs: tuple[Tensor, ...] | None
) -> tuple[dict[str, Tensor], str | None]:
    """Asked by every fused layer at every call: of dictionaries, as nn.Module's own lookup would take the longest."""
    weights: dict[str, Tensor] = {}
    dtype = None
    for name, child in children.items():
        cls, own = type(child), child.__dict__
        if not _has_stock_weight(cls):
            return weights, f"{name} is a {cls.__name__}"
        weight = own["_parameters"].get("weight")
        if weight is None:
            weight = _buffer(own, "weight")
        if type(weight) not in PLAIN_TYPES:
            return weights, f"{name}.weight is a {type(weight).__name__}"
        if own["_parameters"].get("bias") is not None or _buffer(own, "bias") is not None:
            return weights, f"{name} has a bias"
        if weight.requires_grad and not is_evaluated(child, inputs):
            return weights, f"{name}.weight is trained"
        if is_hooked(child):
            return weights, f"{name} has hooks"
        if weight.is_meta:
            return weights, f"{name}.weight is on the meta device, as offloaded ones are"
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
    return (
        cls is nn.Linear
        or "stock_class" in vars(cls)
        or (cls.__name__.endswith("LayerNorm") and cls.__module__.startswith("transformers.models."))
    )


def is_stock(cls: type) -> bool:
    """Is a module without weights of its own what transformers or torch made it?"""
    return cls is nn.Dropout or "stock_class" in vars(cls) or cls.__module__.startswith(_STOCK_MODULES)


def is_evaluated(module: nn.Module, inputs: tuple[Tensor, ...] | None) -> bool:
    """Will nobody want a gradient of its weights in a call on these inputs? None: the question is of training.

    The first run of a reentrant checkpoint records none; the second will, and is to draw the same dropout masks. In
    training mode, or of inputs that require a gradient, this may be a first run. What is exported may run anywhere.
    """
    if inputs is None or torch.is_grad_enabled() or module.training:
        return False
    return not (any(x.requires_grad for x in inputs) or torch.compiler.is_exporting())


def _buffer(own: dict[str, Any], name: str) -> Any:
    """A module's buffer or attribute, or None."""
    found = own["_buffers"].get(name) if own["_buffers"] else None
    return own.get(name) if found is None else found

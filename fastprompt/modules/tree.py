# SPDX-License-Identifier: Apache-2.0
"""Which modules of a model can be swapped, and the stacks that they are in."""

from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from fastprompt._family import FAMILY, SERVED
from fastprompt.modules import MIXINS, SERVED_TORCH, mixin_for
from fastprompt.modules.lm_loss import FastLoss


def check_module(function: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"fastprompt.{function}: model must be a torch.nn.Module, got {type(model).__name__}")


def stock_class(cls: Any) -> type:
    """The class that a module had before it was swapped, if it was."""
    found: type = cls.__dict__.get("stock_class", cls)  # not of a class that others make of it
    return found


def is_family_layer(cls: type) -> bool:
    """A norm, feed-forward or attention layer of the family, swapped or not."""
    stock = stock_class(cls)
    folder = stock.__module__.split(".")[2:3]
    suffixes = tuple(suffix for suffix, (mixin, _) in MIXINS.items() if mixin is not FastLoss)
    return folder != [] and folder[0] in FAMILY and stock.__name__.endswith(suffixes)


def swappable(model: nn.Module) -> Iterator[nn.Module]:
    """What may be swapped: the family's layers, the dropout of a stack itself, the model with the loss, its head."""
    for module in model.modules():
        stock = stock_class(type(module))
        if stock not in SERVED_TORCH and mixin_for(stock) is not None:
            yield module
    for head in lm_heads(model):
        if stock_class(type(head)) is nn.Linear:
            yield head
    for stack in stacks(model):
        dropout = getattr(stack, "dropout", None)
        if dropout is not None and stock_class(type(dropout)) is nn.Dropout:
            yield dropout


def lm_heads(model: nn.Module) -> Iterator[nn.Module]:
    """The language-model heads of the family's models, of any class."""
    for module in model.modules():
        head = getattr(module, "lm_head", None) if is_family_model(module) else None
        if head is not None:
            yield head


def is_family_model(module: nn.Module) -> bool:
    return isinstance(module, PreTrainedModel) and module.config.model_type in FAMILY


def stacks(model: nn.Module) -> Iterator[Any]:
    """The encoders and decoders whose attention function can be set."""
    yield from filter(_is_stack, model.modules())


def _is_stack(module: nn.Module) -> bool:
    return (
        isinstance(module, PreTrainedModel)
        and type(module).__name__.endswith("Stack")
        and module.config.model_type in SERVED
    )


def bias_owners(model: nn.Module) -> dict[nn.Module, tuple[nn.Module, ...]]:
    """By layer of self-attention: the layer, of any class, whose bias it is given: itself, its stack's first, or none.

    In tuples, as layers keep them, they are no child modules.
    """
    owners: dict[nn.Module, tuple[nn.Module, ...]] = {}
    owner: tuple[nn.Module, ...] = ()
    for module in model.modules():
        if _is_stack(module):
            owner = ()
        attention: Any = getattr(module, "SelfAttention", None)
        if attention is not None:
            owner = (module,) if getattr(attention, "has_relative_attention_bias", False) else owner
            owners[module] = owner
    return owners

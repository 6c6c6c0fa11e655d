# SPDX-License-Identifier: Apache-2.0
"""Stamps: did a model or a prompt change since something was computed of it?

It did once a tensor of it was written to, replaced, cast or moved, once a module in it was replaced by one of another
class, once an adapter in it (LoRA and others of PEFT) was switched, scaled or merged, and once autocast was switched.
These leave no trace: writing through ``tensor.data``, also where another Parameter then takes that, or to tensors made
under ``torch.inference_mode``, and what is no tensor, such as another activation function, epsilon, hook or
``forward``.
"""

from collections.abc import Container
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from fastprompt._tensors import parts_of


class State(NamedTuple):
    """What an owner computes with."""

    tensors: list[Tensor]
    classes: list[type]  # of modules; parametrizations and their like give a module one of its own
    adapters: list[str]

    @classmethod
    def of(cls, owner: Tensor | nn.Module) -> Self:
        """Of a tensor, or of a module's parameters, buffers and adapters."""
        if isinstance(owner, Tensor):
            return cls([owner], [], [])
        modules = _modules_of(owner)
        return cls(_tensors_of(modules), list(map(type, modules)), _adapters_of(modules))


class Stamp:
    """A state and that of autocast at one moment.

    It holds no reference to a tensor: torch refuses to swap one that is referenced elsewhere, as ``.to()`` does with
    quantised weights. So an id may be given again, and a new tensor with the same id, version, storage and strides
    counts as unchanged.
    """

    def __init__(self, state: State) -> None:
        self.traces = _traces(state.tensors)
        # They keep the addresses of storages from being given to others.
        self.storages = [StorageWeakRef(tensor.untyped_storage()) for tensor in state.tensors]
        self.classes, self.adapters = state.classes, state.adapters
        self.autocast = _autocast()
        self.stepped = False

    def note_step(self, parameters: Container[int]) -> None:
        """An optimiser wrote to the tensors with these ids."""
        self.stepped = self.stepped or any(trace[0] in parameters for trace in self.traces)

    def fits(self, state: State) -> bool:
        return (
            not self.stepped
            and self.traces == _traces(state.tensors)
            and self.classes == state.classes
            and self.adapters == state.adapters
            and self.autocast == _autocast()
        )


def adapters_of(model: nn.Module) -> list[str]:
    """What decides, beside their weights, what PEFT's adapter layers in ``model`` compute: one entry for each."""
    return _adapters_of(list(model.modules()))  # in this order, which files stand on


def _modules_of(owner: nn.Module) -> list[nn.Module]:
    """Those of ``owner.modules()``, whose nested generators take milliseconds over a large model."""
    found, seen = [owner], {owner}
    for module in found:  # which grows meanwhile
        for child in module._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                found.append(child)
    return found


def _adapters_of(modules: list[nn.Module]) -> list[str]:
    parts = ("_disable_adapters", "_active_adapter", "merged_adapters", "scaling")
    # Each class is asked once, of a hundred modules.
    classes = {cls for cls in set(map(type, modules)) if hasattr(cls, parts[0])}
    return [
        repr([getattr(each, part, None) for part in parts])
        for each in modules
        if type(each) in classes or parts[0] in each.__dict__
    ]


def _tensors_of(modules: list[nn.Module]) -> list[Tensor]:
    entries: list[Tensor | None] = []
    for module in modules:
        if module._parameters:
            entries.extend(module._parameters.values())
        if module._buffers:
            entries.extend(module._buffers.values())
    tensors = [each for each in entries if each is not None]
    for each in tensors:  # and what quantised ones are made of, which may be written to by itself
        if type(each) is not nn.Parameter:
            tensors += parts_of(each).values()
    return tensors


def _traces(tensors: list[Tensor]) -> list[tuple[Any, ...]]:
    """What tensors are: their ids, how often they were written to, their storages, and how they see those."""
    return [
        (
            id(each),
            None if each.is_inference() else each._version,
            each.untyped_storage()._cdata,
            each.dtype,
            each.shape,
            each.stride(),
            each.storage_offset(),
        )
        for each in tensors
    ]


def _autocast() -> tuple[torch.dtype | None, ...]:
    return tuple(
        torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        for device in ("cpu", "cuda")
    )

# SPDX-License-Identifier: Apache-2.0
"""The tensors that a graph reads: those of a call are copied to where it reads them."""

from collections.abc import Callable
from itertools import count
from typing import Any

import torch
from torch import Tensor

from fastprompt._allowed import Allowed, PromptKeys, is_kept

COPIED = {"cuda": 2**28, "cpu": 2**24}  # bytes of the keys of kept prompts, in much less than a token's time


class Places:
    """Tensors that stay where they are, and take a call's values."""

    def __init__(self) -> None:
        self._tensors: dict[Any, Tensor] = {}
        self._taken: dict[Any, tuple[Tensor, int]] = {}

    def put(self, call: Any) -> Any:
        """``call`` with the tensors here, that hold its values, in place of its own."""
        numbers = count()

        def place(x: Tensor) -> Tensor:
            key = next(numbers), x.shape, x.dtype
            found = self._tensors.get(key)
            if found is None:
                with torch.inference_mode(False):  # calls outside that mode will write to it
                    found = self._tensors[key] = x.detach().clone()
            elif not self._holds(key, x):
                found.copy_(x)
            if not x.is_inference():  # whose writes nobody counts
                self._taken[key] = x, x._version
            return found

        return with_tensors(call, place)

    def _holds(self, key: Any, x: Tensor) -> bool:
        tensor, version = self._taken.pop(key, (None, 0))
        return tensor is x and x._version == version

    def forget(self) -> None:
        """Keep no call's tensors alive."""
        self._taken.clear()


def with_tensors(call: Any, place: Callable[[Tensor], Tensor]) -> Any:
    """``call``, of dictionaries and of what attention is told, with ``place`` of each tensor that is copied."""
    if isinstance(call, Tensor):
        return place(call)
    if isinstance(call, dict):
        return {name: with_tensors(value, place) for name, value in call.items()}
    if isinstance(call, PromptKeys) and not _are_copied(call):
        return PromptKeys(call.keys, call.values, *(with_tensors(value, place) for value in call[2:]))
    if isinstance(call, PromptKeys | Allowed):
        return type(call)(*(with_tensors(value, place) for value in call))
    if isinstance(call, tuple):
        return tuple(with_tensors(value, place) for value in call)
    return call


def signature(call: Any, addresses: bool = True) -> Any:
    """A hashable description of all that a graph of ``call`` fixes.

    ``addresses``: with those of prompt keys that are read where they lie.
    """
    if isinstance(call, Tensor):
        return call.shape, call.dtype, call.device
    if isinstance(call, dict):
        return tuple((name, signature(value, addresses)) for name, value in call.items())
    if isinstance(call, PromptKeys) and addresses and not _are_copied(call):
        return tuple(_where(value) for value in call[:2]), tuple(signature(value) for value in call)
    if isinstance(call, tuple):
        return tuple(signature(value, addresses) for value in call)
    return repr(call)


def _are_copied(prompts: PromptKeys) -> bool:
    """Keys and values that were computed for this call lie elsewhere in the next; kept ones stay, and may be many."""
    keys = prompts.keys
    return not is_kept(keys) or sum(x.nbytes for x in keys) <= COPIED[keys[0].device.type]


def _where(layers: tuple[Tensor, ...]) -> Any:
    return tuple((x.data_ptr(), x.stride()) for x in layers)

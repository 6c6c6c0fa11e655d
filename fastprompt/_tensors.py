# SPDX-License-Identifier: Apache-2.0
"""Tensors that are more than their own memory: parts of a whole on several devices, a whole of several parts."""

from typing import Any

from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Is it a DTensor, as FSDP2 makes one: whole in the forward of what it was sharded with, in parts outside?"""
    return hasattr(tensor, "device_mesh")


def parts_of(tensor: Any) -> dict[str, Tensor]:
    """What a quantised weight, such as torchao's, is made of, by name; nothing of a plain tensor or None."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return {}
    return {name: getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]}

# SPDX-License-Identifier: Apache-2.0
"""Weights as torchao quantises them: tensors of another class, made of plain ones."""

import torch
from torch import nn
from torch.utils._pytree import tree_map

aten = torch.ops.aten


class Quantised(torch.Tensor):
    """An embedding table, rows int8 [V, D] times scale [V, 1]: it looks up rows, and no more."""

    @staticmethod
    def __new__(cls, rows, scale):
        return torch.Tensor._make_wrapper_subclass(cls, rows.shape, dtype=scale.dtype, device=rows.device)

    def __init__(self, rows, scale):
        self.rows, self.scale = rows, scale

    def __tensor_flatten__(self):
        return ["rows", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is aten.detach.default:
            return cls(args[0].rows, args[0].scale)
        if function is aten.embedding.default:
            table, ids = args[:2]
            return table.rows[ids] * table.scale[ids]
        raise NotImplementedError(f"Quantised: {function}")


def quantise(embedding):
    """In place; the values stay where they are multiples of the largest of their row by 1/127."""
    weight = embedding.weight.detach()
    scale = weight.abs().amax(1, keepdim=True) / 127
    embedding.weight = nn.Parameter(
        Quantised((weight / scale).round().to(torch.int8), scale), requires_grad=False
    )


class Doubled(torch.Tensor):
    """Twice a plain tensor, which it holds, as quantised weights hold theirs."""

    @staticmethod
    def __new__(cls, half):
        return torch.Tensor._make_wrapper_subclass(cls, half.shape, dtype=half.dtype, device=half.device)

    def __init__(self, half):
        self.half = half

    def __tensor_flatten__(self):
        return ["half"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, _context, _size, _stride):
        return cls(inner["half"])

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is aten.detach.default:
            return cls(args[0].half)
        args = tree_map(lambda x: 2 * x.half if isinstance(x, cls) else x, args)
        return function(*args, **(kwargs or {}))

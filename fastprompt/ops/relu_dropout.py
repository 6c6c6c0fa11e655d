# SPDX-License-Identifier: Apache-2.0
"""relu_dropout: y = dropout(relu(x)), the middle of T5 v1.0's feed-forward layer, with one bit saved per element.

    x, y [..., F]          of one dtype
    kept [ceil(N / 8)]     uint8, N elements: bit i % 8 of byte i // 8 says that element i passes ReLU and dropout

Backward: dx = dy / (1 - p) where the bit is set, else 0. That is all a frozen feed-forward layer has to save: no weight
gradient asks for y, and neither ReLU nor dropout for more than the bit.

Source: transformers T5DenseActDense.
"""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fastprompt._native import DTYPE_CODES, contiguous, covers, stream
from fastprompt.dispatch import Op, direct
from fastprompt.ops._checks import FLOATS, check_same_device, check_shape, check_tensor
from fastprompt.ops._dropout import check_dropout, check_rate, drawn_seed, dropout, keep_mask, keep_scale
from fastprompt.ops._wide import wide

op = Op("relu_dropout")


def relu_dropout(x: Tensor, *, dropout_p: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """``dropout(relu(x))`` in one pass.

    Args:
        x: [..., F] float32, bfloat16, float16 or float64.
        dropout_p: probability of dropping an element, to the nearest 2^-16.
        seed: [1] int64 on x's device, fixes the dropout mask; drawn from torch's generator when None.

    Returns:
        y [..., F] in x's dtype.

    Raises:
        TypeError, ValueError: an argument has another dtype, shape or device, or dropout_p is outside [0, 1].
    """
    seed = drawn_seed(seed, dropout_p, x)
    return direct.relu_dropout(x, seed, dropout_p)[0]


def _check(x: Tensor, seed: Tensor | None, dropout_p: float) -> None:
    check_tensor("relu_dropout", "x", x, FLOATS)
    check_dropout("relu_dropout", dropout_p, seed, x)


def _check_backward(dy: Tensor, kept: Tensor, dropout_p: float) -> None:
    name = "relu_dropout_backward"
    check_tensor(name, "dy", dy, FLOATS)
    check_tensor(name, "kept", kept, (torch.uint8,))
    check_shape(name, "kept", kept, ((dy.numel() + 7) // 8,), "[ceil(N / 8)]")
    check_same_device(name, "kept", kept, "dy", dy)
    check_rate(name, dropout_p)


def _fake(x: Tensor, seed: Tensor | None, dropout_p: float) -> tuple[Tensor, Tensor]:
    kept = x.new_empty(((x.numel() + 7) // 8,), dtype=torch.uint8)
    return torch.empty_like(x, memory_format=torch.contiguous_format), kept


@op.define(
    "relu_dropout(Tensor x, Tensor? seed, float dropout_p) -> (Tensor y, Tensor kept)",
    check=_check,
    fake=_fake,
)
def relu_dropout_reference(x: Tensor, seed: Tensor | None, dropout_p: float) -> tuple[Tensor, Tensor]:
    y = dropout(torch.relu(wide(x)), seed, dropout_p)
    passes = ~(x <= 0)  # NaN passes, as in torch
    if seed is not None and dropout_p > 0.0:
        passes &= keep_mask(tuple(x.shape), dropout_p, seed)
    bits = passes.reshape(-1).to(torch.uint8)
    bits = torch.nn.functional.pad(bits, (0, -len(bits) % 8)).reshape(-1, 8)
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=x.device)
    return y.to(x.dtype).contiguous(), (bits * weights).sum(1, dtype=torch.uint8)


@op.native
def _native_relu_dropout(kernels: SimpleNamespace, x: Tensor, seed: Tensor | None, dropout_p: float) -> Any:
    if not covers(x):
        return NotImplemented
    x = x.contiguous()
    y, kept = torch.empty_like(x), x.new_empty(((x.numel() + 7) // 8,), dtype=torch.uint8)
    if x.numel():
        kernels.relu_dropout(
            x, seed, y, kept, x.numel(), dropout_p,
            DTYPE_CODES[x.dtype], stream(x),
        )  # fmt: skip
    return y, kept


@op.triton
def _triton_relu_dropout(x: Tensor, seed: Tensor | None, dropout_p: float) -> Any:
    from fastprompt.triton_kernels import relu_dropout as kernels

    return kernels.relu_dropout(x.contiguous(), seed, dropout_p) if covers(x) else NotImplemented


def _fake_backward(dy: Tensor, kept: Tensor, dropout_p: float) -> Tensor:
    return torch.empty_like(dy, memory_format=torch.contiguous_format)


@op.define(
    "relu_dropout_backward(Tensor dy, Tensor kept, float dropout_p) -> Tensor",
    check=_check_backward,
    fake=_fake_backward,
)
def relu_dropout_backward_reference(dy: Tensor, kept: Tensor, dropout_p: float) -> Tensor:
    bits = kept[:, None] >> torch.arange(8, dtype=torch.uint8, device=kept.device) & 1
    passes = bits.reshape(-1)[: dy.numel()].reshape(dy.shape).bool()
    return torch.where(passes, wide(dy) * keep_scale(dropout_p), 0.0).to(dy.dtype).contiguous()


@op.native
def _native_relu_dropout_backward(
    kernels: SimpleNamespace, dy: Tensor, kept: Tensor, dropout_p: float
) -> Any:
    if not covers(dy):
        return NotImplemented
    dy, kept = contiguous(dy, kept)
    dx = torch.empty_like(dy)
    if dy.numel():
        kernels.relu_dropout_backward(
            dy, kept, dx, dy.numel(), dropout_p, DTYPE_CODES[dy.dtype],
            stream(dy),
        )  # fmt: skip
    return dx


@op.triton
def _triton_relu_dropout_backward(dy: Tensor, kept: Tensor, dropout_p: float) -> Any:
    from fastprompt.triton_kernels import relu_dropout as kernels

    if not covers(dy):
        return NotImplemented
    return kernels.relu_dropout_backward(*contiguous(dy, kept), dropout_p)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.dropout_p = inputs[2]
    ctx.save_for_backward(output[1])


def _backward(ctx: Any, dy: Tensor | None, _dkept: None) -> tuple[Tensor | None, None, None]:
    if dy is None:
        return None, None, None
    (kept,) = ctx.saved_tensors
    return direct.relu_dropout_backward(dy, kept, ctx.dropout_p), None, None


op.autograd("relu_dropout", setup_context=_setup_context, backward=_backward)
op.publish()

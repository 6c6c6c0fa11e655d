# SPDX-License-Identifier: Apache-2.0
"""dropout_add: h = residual + dropout(x), the end of every T5 sublayer; without a residual, dropout alone.

    x, residual, h [..., D]   of one dtype

The mask is a function of the seed and the element's index (docs/decisions/0004), so the backward pass rebuilds it and
saves the seed alone:  dx = dropout(dh) by the same mask, dresidual = dh.

Source: transformers T5LayerFF and its siblings, `hidden_states + self.dropout(forwarded_states)`.
"""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fastprompt._native import DTYPE_CODES, contiguous, covers, stream
from fastprompt.dispatch import Op, direct
from fastprompt.ops._checks import FLOATS, check_same_device, check_shape, check_tensor
from fastprompt.ops._dropout import check_dropout, drawn_seed, dropout
from fastprompt.ops._wide import wide

op = Op("dropout_add")


def dropout_add(
    x: Tensor, residual: Tensor | None = None, *, dropout_p: float = 0.0, seed: Tensor | None = None
) -> Tensor:
    """``residual + dropout(x)`` in one pass; no mask is stored.

    Args:
        x: [..., D] float32, bfloat16, float16 or float64.
        residual: [..., D], x's dtype; None: nothing is added.
        dropout_p: probability of dropping an element of ``x``, to the nearest 2^-16.
        seed: [1] int64 on x's device, fixes the dropout mask; drawn from torch's generator when None.

    Returns:
        h [..., D] in x's dtype.

    Raises:
        TypeError, ValueError: an argument has another dtype, shape or device, or dropout_p is outside [0, 1].
    """
    seed = drawn_seed(seed, dropout_p, x)
    return direct.dropout_add(x, residual, seed, dropout_p)


def _check(x: Tensor, residual: Tensor | None, seed: Tensor | None, dropout_p: float) -> None:
    check_tensor("dropout_add", "x", x, FLOATS)
    if residual is not None:
        check_tensor("dropout_add", "residual", residual, (x.dtype,))
        check_shape("dropout_add", "residual", residual, tuple(x.shape), "that of x")
        check_same_device("dropout_add", "residual", residual, "x", x)
    check_dropout("dropout_add", dropout_p, seed, x)


def _fake(x: Tensor, residual: Tensor | None, seed: Tensor | None, dropout_p: float) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@op.define(
    "dropout_add(Tensor x, Tensor? residual, Tensor? seed, float dropout_p) -> Tensor",
    check=_check,
    fake=_fake,
)
def dropout_add_reference(
    x: Tensor, residual: Tensor | None, seed: Tensor | None, dropout_p: float
) -> Tensor:
    h = dropout(wide(x), seed, dropout_p)
    if residual is not None:
        h = residual + h
    return h.to(x.dtype, copy=residual is None).contiguous()


@op.native
def _native_dropout_add(
    kernels: SimpleNamespace, x: Tensor, residual: Tensor | None, seed: Tensor | None, dropout_p: float
) -> Any:
    if not covers(x):
        return NotImplemented
    x, residual = contiguous(x, residual)
    h = torch.empty_like(x)
    if x.numel():
        kernels.dropout_add(
            x, residual, seed, h, x.numel(), dropout_p,
            DTYPE_CODES[x.dtype], stream(x),
        )  # fmt: skip
    return h


@op.triton
def _triton_dropout_add(x: Tensor, residual: Tensor | None, seed: Tensor | None, dropout_p: float) -> Any:
    from fastprompt.triton_kernels import dropout_add as kernels

    if not covers(x):
        return NotImplemented
    return kernels.dropout_add(*contiguous(x, residual), seed, dropout_p)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], _output: Tensor) -> None:
    _, _, seed, ctx.dropout_p = inputs
    ctx.save_for_backward(seed)


def _backward(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:
    dx = dh
    if ctx.dropout_p > 0.0 and ctx.needs_input_grad[0]:
        dx = direct.dropout_add(dh, None, ctx.saved_tensors[0], ctx.dropout_p)
    needs_x, needs_residual = ctx.needs_input_grad[:2]
    return dx if needs_x else None, dh if needs_residual else None, None, None


op.autograd("dropout_add", setup_context=_setup_context, backward=_backward)
op.publish()

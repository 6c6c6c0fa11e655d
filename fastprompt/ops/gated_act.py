# SPDX-License-Identifier: Apache-2.0
"""gated_act: y = dropout(act(a) * b), the middle of T5 v1.1's gated feed-forward layer.

    a, b [..., F]   the two projections wi_0(x) and wi_1(x)
    y    [..., F]   in their dtype

act is "gelu_new" (gelu by tanh: T5 v1.1, FLAN, mT5), "gelu" (by erf) or "silu" (UL2). Arithmetic is fp32 (float64 for
float64 inputs) with one rounding at the end; HF computes gelu_new in eight operations and rounds after each. Backward,
with g = dropout(dy) by the same mask:  da = g * b * act'(a),  db = g * act(a). Nothing is saved but a, b and the seed.

gelu_new is computed as a * sigmoid(2u), u = sqrt(2 / pi) * (a + 0.044715 a^3): 1 + tanh(u) without its cancellation.

Source: Shazeer 2020, "GLU variants improve transformer"; transformers T5DenseGatedActDense and
NewGELUActivation.
"""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fastprompt._native import DTYPE_CODES, contiguous, covers, stream
from fastprompt.dispatch import Op, direct
from fastprompt.ops._checks import FLOATS, check_same_device, check_shape, check_tensor, fail
from fastprompt.ops._dropout import check_dropout, drawn_seed, dropout
from fastprompt.ops._wide import wide

op = Op("gated_act")

ACTS = ("gelu_new", "gelu", "silu")  # csrc numbers them in this order


def gated_act(
    a: Tensor, b: Tensor, act: str = "gelu_new", *, dropout_p: float = 0.0, seed: Tensor | None = None
) -> Tensor:
    """``dropout(act(a) * b)`` in one pass.

    Args:
        a: [..., F] float32, bfloat16, float16 or float64: goes through the activation.
        b: [..., F], a's dtype: the gate's other side.
        act: "gelu_new", "gelu" or "silu".
        dropout_p: probability of dropping an element, to the nearest 2^-16.
        seed: [1] int64 on a's device, fixes the dropout mask; drawn from torch's generator when None.

    Returns:
        y [..., F] in a's dtype.

    Raises:
        TypeError, ValueError: an argument has another dtype, shape or device, dropout_p is outside [0, 1], or the
            activation is unknown.
    """
    seed = drawn_seed(seed, dropout_p, a)
    return direct.gated_act(a, b, seed, act, dropout_p)


def _check(a: Tensor, b: Tensor, seed: Tensor | None, act: str, dropout_p: float) -> None:
    check_tensor("gated_act", "a", a, FLOATS)
    check_tensor("gated_act", "b", b, (a.dtype,))
    check_shape("gated_act", "b", b, tuple(a.shape), "that of a")
    check_same_device("gated_act", "b", b, "a", a)
    if act not in ACTS:
        fail("gated_act", f"act must be one of {', '.join(ACTS)}, got {act!r}")
    check_dropout("gated_act", dropout_p, seed, a)


def _check_backward(
    dy: Tensor, a: Tensor, b: Tensor, seed: Tensor | None, act: str, dropout_p: float
) -> None:
    _check(a, b, seed, act, dropout_p)
    check_tensor("gated_act_backward", "dy", dy, (a.dtype,))
    check_shape("gated_act_backward", "dy", dy, tuple(a.shape), "that of a")
    check_same_device("gated_act_backward", "dy", dy, "a", a)


def _curve(x: Tensor, act: str) -> tuple[Tensor, Tensor]:
    """act(x) and act'(x)."""
    if act == "gelu":
        cdf = 0.5 * (1 + torch.erf(x / 2**0.5))
        return x * cdf, cdf + x * torch.exp(-0.5 * x * x) / (2 * torch.pi) ** 0.5
    twice = 2 * (2 / torch.pi) ** 0.5
    v = x if act == "silu" else twice * x * (1 + 0.044715 * x * x)
    s = torch.sigmoid(v)
    steepness = torch.ones_like(x) if act == "silu" else twice * (1 + 3 * 0.044715 * x * x)
    bend = s * torch.sigmoid(-v)  # zero far out, where steepness may be infinite
    return x * s, torch.where(bend == 0, s, s + x * bend * steepness)


def _fake(a: Tensor, b: Tensor, seed: Tensor | None, act: str, dropout_p: float) -> Tensor:
    return torch.empty_like(a, memory_format=torch.contiguous_format)


@op.define(
    "gated_act(Tensor a, Tensor b, Tensor? seed, str act, float dropout_p) -> Tensor",
    check=_check,
    fake=_fake,
)
def gated_act_reference(a: Tensor, b: Tensor, seed: Tensor | None, act: str, dropout_p: float) -> Tensor:
    y = _curve(wide(a), act)[0] * b
    return dropout(y, seed, dropout_p).to(a.dtype).contiguous()


@op.native
def _native_gated_act(
    kernels: SimpleNamespace, a: Tensor, b: Tensor, seed: Tensor | None, act: str, dropout_p: float
) -> Any:
    if not covers(a):
        return NotImplemented
    a, b = contiguous(a, b)
    y = torch.empty_like(a)
    if a.numel():
        kernels.gated_act(
            a, b, seed, y, a.numel(), ACTS.index(act), dropout_p,
            DTYPE_CODES[a.dtype], stream(a),
        )  # fmt: skip
    return y


@op.triton
def _triton_gated_act(a: Tensor, b: Tensor, seed: Tensor | None, act: str, dropout_p: float) -> Any:
    from fastprompt.triton_kernels import gated_act as kernels

    if not covers(a):
        return NotImplemented
    return kernels.gated_act(*contiguous(a, b), seed, act, dropout_p)


def _fake_backward(
    dy: Tensor, a: Tensor, b: Tensor, seed: Tensor | None, act: str, dropout_p: float
) -> tuple[Tensor, Tensor]:
    da = torch.empty_like(a, memory_format=torch.contiguous_format)
    return da, torch.empty_like(da)


@op.define(
    "gated_act_backward(Tensor dy, Tensor a, Tensor b, Tensor? seed, str act, float dropout_p)"
    " -> (Tensor da, Tensor db)",
    check=_check_backward,
    fake=_fake_backward,
)
def gated_act_backward_reference(
    dy: Tensor, a: Tensor, b: Tensor, seed: Tensor | None, act: str, dropout_p: float
) -> tuple[Tensor, Tensor]:
    g = dropout(wide(dy), seed, dropout_p)
    value, slope = _curve(wide(a), act)
    return (g * b * slope).to(a.dtype).contiguous(), (g * value).to(a.dtype).contiguous()


@op.native
def _native_gated_act_backward(
    kernels: SimpleNamespace, dy: Tensor, a: Tensor, b: Tensor, seed: Tensor | None, act: str,
    dropout_p: float,
) -> Any:  # fmt: skip
    if not covers(a):
        return NotImplemented
    dy, a, b = contiguous(dy, a, b)
    da, db = torch.empty_like(a), torch.empty_like(a)
    if a.numel():
        kernels.gated_act_backward(
            dy, a, b, seed, da, db, a.numel(),
            ACTS.index(act), dropout_p, DTYPE_CODES[a.dtype], stream(a),
        )  # fmt: skip
    return da, db


@op.triton
def _triton_gated_act_backward(
    dy: Tensor, a: Tensor, b: Tensor, seed: Tensor | None, act: str, dropout_p: float
) -> Any:
    from fastprompt.triton_kernels import gated_act as kernels

    if not covers(a):
        return NotImplemented
    return kernels.gated_act_backward(*contiguous(dy, a, b), seed, act, dropout_p)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], _output: Tensor) -> None:
    a, b, seed, ctx.act, ctx.dropout_p = inputs
    ctx.save_for_backward(a, b, seed)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    a, b, seed = ctx.saved_tensors
    da, db = direct.gated_act_backward(dy, a, b, seed, ctx.act, ctx.dropout_p)
    needs_a, needs_b = ctx.needs_input_grad[:2]
    return da if needs_a else None, db if needs_b else None, None, None, None


op.autograd("gated_act", setup_context=_setup_context, backward=_backward)
op.publish()

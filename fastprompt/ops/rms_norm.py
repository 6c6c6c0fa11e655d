# SPDX-License-Identifier: Apache-2.0
"""rms_norm: y = w * h / sqrt(mean(h^2) + eps), T5's norm: no mean is subtracted, no bias is added.

    h   [..., D]   the input, or residual + dropout(x) in the fused form
    w   [D]        frozen
    y   [..., D]   in w's dtype, as HF returns it
    rstd [N]       fp32, one per row: all that the backward saves beside h

Statistics and arithmetic are fp32 (float64 for float64 inputs), with one rounding at the end; HF's T5LayerNorm rounds
twice in half precision. Backward, with g = dy * w:  dh = rstd * (g - h * rstd^2 * mean(g * h)); w gets no gradient.

Source: Zhang & Sennrich 2019; transformers T5LayerNorm, and `hidden + dropout(sublayer(norm(hidden)))`.
"""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fastprompt._native import DTYPE_CODES, contiguous, covers, stream
from fastprompt.dispatch import Op, direct
from fastprompt.ops._checks import (
    FLOATS,
    check_frozen,
    check_number,
    check_same_device,
    check_shape,
    check_tensor,
    fail,
    refuse_gradient,
)
from fastprompt.ops._dropout import check_dropout, check_rate, drawn_seed, dropout
from fastprompt.ops._wide import wide_dtype

op = Op("rms_norm")


def rms_norm(
    x: Tensor,
    w: Tensor,
    eps: float = 1e-6,
    *,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """T5's RMS norm of ``x``, or of ``residual + dropout(x)`` in one pass.

    Args:
        x: [..., D] float32, bfloat16, float16 or float64.
        w: [D], frozen, of any of these dtypes, which is the output's.
        eps: added to the mean square before the root.
        residual: [..., D] of any of these dtypes, the stream that ``x`` is added to.
        dropout_p: probability of dropping an element of ``x`` before the addition, to the nearest 2^-16; needs
            ``residual``.
        seed: [1] int64 on x's device, fixes the dropout mask; drawn from torch's generator when None. Needs
            ``residual``, too.

    Returns:
        y [..., D]; with ``residual``: (y, h), h [..., D] the new residual stream in the wider dtype of x and residual.

    Raises:
        TypeError, ValueError: an argument has another dtype, shape or device, dropout_p is outside [0, 1], or w
            requires grad.
    """
    check_frozen("rms_norm", "w", w)
    if residual is None:
        check_rate("rms_norm", dropout_p)
        if dropout_p != 0.0 or seed is not None:
            given = "a seed" if dropout_p == 0.0 else f"dropout_p={dropout_p}"
            fail(
                "rms_norm", f"{given} needs a residual: T5 drops the sublayer's output, not the norm's input"
            )
        return direct.rms_norm(x, w, eps)[0]
    seed = drawn_seed(seed, dropout_p, x)
    y, h, _ = direct.rms_norm_residual(x, residual, w, seed, eps, dropout_p)
    return y, h


def _check(x: Tensor, w: Tensor, eps: float) -> None:
    check_tensor("rms_norm", "x", x, FLOATS)
    check_tensor("rms_norm", "w", w, FLOATS)
    if x.dim() < 1:
        fail("rms_norm", "x must have shape [..., D], got a scalar")
    if x.shape[-1] < 1:
        fail("rms_norm", f"x must have shape [..., D] with D of 1 or more, got {list(x.shape)}")
    check_shape("rms_norm", "w", w, (x.shape[-1],), "[D]")
    check_same_device("rms_norm", "w", w, "x", x)
    check_number("rms_norm", "eps", eps)
    if not eps >= 0.0:
        fail("rms_norm", f"eps must not be negative, got {eps}")


def _check_residual(
    x: Tensor, residual: Tensor, w: Tensor, seed: Tensor | None, eps: float, dropout_p: float
) -> None:
    _check(x, w, eps)
    check_tensor("rms_norm", "residual", residual, FLOATS)
    check_shape("rms_norm", "residual", residual, tuple(x.shape), "that of x")
    check_same_device("rms_norm", "residual", residual, "x", x)
    check_dropout("rms_norm", dropout_p, seed, x)


def _check_backward(dy: Tensor | None, x: Tensor, w: Tensor, rstd: Tensor) -> None:
    """x is what was normed: the kernels trust these shapes, and the ops can be called by anyone."""
    _check(x, w, 0.0)
    for name, value, dtype, shape, symbols in (
        ("dy", dy, w.dtype, tuple(x.shape), "that of x"),
        ("rstd", rstd, wide_dtype(x, w), (_rows(x),), "[N]"),
    ):
        if value is not None:
            check_tensor("rms_norm_backward", name, value, (dtype,))
            check_shape("rms_norm_backward", name, value, shape, symbols)
            check_same_device("rms_norm_backward", name, value, "x", x)


def _check_residual_backward(
    dy: Tensor | None, dh: Tensor | None, h: Tensor, w: Tensor, rstd: Tensor, seed: Tensor | None,
    dropout_p: float, x_dtype: torch.dtype, residual_dtype: torch.dtype,
) -> None:  # fmt: skip
    name = "rms_norm_residual_backward"
    _check_backward(dy, h, w, rstd)
    if dh is not None:
        check_tensor(name, "dh", dh, (h.dtype,))
        check_shape(name, "dh", dh, tuple(h.shape), "that of h")
        check_same_device(name, "dh", dh, "h", h)
    check_dropout(name, dropout_p, seed, h)
    if (
        x_dtype not in FLOATS
        or residual_dtype not in FLOATS
        or torch.promote_types(x_dtype, residual_dtype) != h.dtype
    ):
        fail(
            name,
            f"x_dtype and residual_dtype must promote to h's {h.dtype}, got {x_dtype} and {residual_dtype}",
        )


def _rows(x: Tensor) -> int:
    return x.numel() // x.shape[-1]


def _fake_rms_norm(x: Tensor, w: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=w.dtype), x.new_empty((_rows(x),), dtype=wide_dtype(x, w))


@op.define(
    "rms_norm(Tensor x, Tensor w, float eps) -> (Tensor y, Tensor rstd)", check=_check, fake=_fake_rms_norm
)
def rms_norm_reference(x: Tensor, w: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = x.to(wide_dtype(x, w))
    rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (w * (wide * rstd)).to(w.dtype).contiguous(), rstd.reshape(-1)


@op.native
def _native_rms_norm(kernels: SimpleNamespace, x: Tensor, w: Tensor, eps: float) -> Any:
    if not covers(x, w):
        return NotImplemented
    x, w = contiguous(x, w)
    N, D = _rows(x), x.shape[-1]
    y = torch.empty_like(x, dtype=w.dtype)
    rstd = x.new_empty((N,), dtype=torch.float32)
    if N:
        kernels.rms_norm(
            x, w, y, rstd,
            N, D, eps, DTYPE_CODES[x.dtype], DTYPE_CODES[w.dtype], stream(x),
        )  # fmt: skip
    return y, rstd


@op.triton
def _triton_rms_norm(x: Tensor, w: Tensor, eps: float) -> Any:
    from fastprompt.triton_kernels import rms_norm as kernels

    return kernels.rms_norm(*contiguous(x, w), eps) if covers(x, w) else NotImplemented


def _fake_rms_norm_backward(dy: Tensor, x: Tensor, w: Tensor, rstd: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@op.define(
    "rms_norm_backward(Tensor dy, Tensor x, Tensor w, Tensor rstd) -> Tensor",
    check=_check_backward,
    fake=_fake_rms_norm_backward,
)
def rms_norm_backward_reference(dy: Tensor, x: Tensor, w: Tensor, rstd: Tensor) -> Tensor:
    return _backward_of(dy, x, w, rstd)


def _backward_of(dy: Tensor, x: Tensor, w: Tensor, rstd: Tensor) -> Tensor:
    wide, rstd = x.to(wide_dtype(x, w)), rstd.reshape(*x.shape[:-1], 1)
    g = dy * w.to(wide.dtype)
    return (rstd * (g - wide * rstd.pow(2) * (g * wide).mean(-1, keepdim=True))).to(x.dtype).contiguous()


@op.native
def _native_rms_norm_backward(
    kernels: SimpleNamespace, dy: Tensor, x: Tensor, w: Tensor, rstd: Tensor
) -> Any:
    if not covers(dy, x, w):
        return NotImplemented
    dy, x, w, rstd = contiguous(dy, x, w, rstd)
    dx = torch.empty_like(x)
    if x.numel():
        kernels.rms_norm_backward(
            dy, x, w, rstd, dx,
            _rows(x), x.shape[-1], DTYPE_CODES[x.dtype], DTYPE_CODES[w.dtype], stream(x),
        )  # fmt: skip
    return dx


@op.triton
def _triton_rms_norm_backward(dy: Tensor, x: Tensor, w: Tensor, rstd: Tensor) -> Any:
    from fastprompt.triton_kernels import rms_norm as kernels

    if not covers(dy, x, w):
        return NotImplemented
    return kernels.rms_norm_backward(*contiguous(dy, x, w, rstd))


def _setup_rms_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, w, _ = inputs
    ctx.set_materialize_grads(False)
    if ctx.needs_input_grad[1]:
        refuse_gradient("rms_norm", "w")
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, w, output[1])


def _backward_rms_norm(ctx: Any, dy: Tensor | None, _drstd: None) -> tuple[Tensor | None, None, None]:
    if dy is None or not ctx.needs_input_grad[0]:
        return None, None, None
    x, w, rstd = ctx.saved_tensors
    return direct.rms_norm_backward(dy, x, w, rstd), None, None


op.autograd("rms_norm", setup_context=_setup_rms_norm, backward=_backward_rms_norm)


def _fake_rms_norm_residual(
    x: Tensor, residual: Tensor, w: Tensor, seed: Tensor | None, eps: float, dropout_p: float
) -> tuple[Tensor, Tensor, Tensor]:
    h_dtype = torch.promote_types(x.dtype, residual.dtype)
    y, h = x.new_empty(x.shape, dtype=w.dtype), x.new_empty(x.shape, dtype=h_dtype)
    return y, h, x.new_empty((_rows(x),), dtype=wide_dtype(h, w))


@op.define(
    "rms_norm_residual(Tensor x, Tensor residual, Tensor w, Tensor? seed, float eps, float dropout_p)"
    " -> (Tensor y, Tensor h, Tensor rstd)",
    check=_check_residual,
    fake=_fake_rms_norm_residual,
)
def rms_norm_residual_reference(
    x: Tensor, residual: Tensor, w: Tensor, seed: Tensor | None, eps: float, dropout_p: float
) -> tuple[Tensor, Tensor, Tensor]:
    wide = dropout(x.to(wide_dtype(x, residual, w)), seed, dropout_p)
    h = (residual + wide).to(torch.promote_types(x.dtype, residual.dtype)).contiguous()
    y, rstd = rms_norm_reference(h, w, eps)
    return y, h, rstd


@op.native
def _native_rms_norm_residual(
    kernels: SimpleNamespace,
    x: Tensor,
    residual: Tensor,
    w: Tensor,
    seed: Tensor | None,
    eps: float,
    dropout_p: float,
) -> Any:
    if not covers(x, residual, w):
        return NotImplemented
    x, residual, w = contiguous(x, residual, w)
    N, D = _rows(x), x.shape[-1]
    y = torch.empty_like(x, dtype=w.dtype)
    h = torch.empty_like(x, dtype=torch.promote_types(x.dtype, residual.dtype))
    rstd = x.new_empty((N,), dtype=torch.float32)
    if N:
        kernels.rms_norm_residual(
            x, residual, w, seed, h, y,
            rstd, N, D, eps, dropout_p,
            DTYPE_CODES[x.dtype], DTYPE_CODES[residual.dtype], DTYPE_CODES[w.dtype], stream(x),
        )  # fmt: skip
    return y, h, rstd


@op.triton
def _triton_rms_norm_residual(
    x: Tensor, residual: Tensor, w: Tensor, seed: Tensor | None, eps: float, dropout_p: float
) -> Any:
    from fastprompt.triton_kernels import rms_norm as kernels

    if not covers(x, residual, w):
        return NotImplemented
    return kernels.rms_norm_residual(*contiguous(x, residual, w), seed, eps, dropout_p)


def _empty_residual_gradients(
    h: Tensor, dropout_p: float, x_dtype: torch.dtype, residual_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """dresidual and dx; dx is empty where it is dresidual."""
    same = dropout_p == 0.0 and x_dtype == residual_dtype
    return h.new_empty(h.shape, dtype=residual_dtype), h.new_empty((0,) if same else h.shape, dtype=x_dtype)


def _fake_rms_norm_residual_backward(
    dy: Tensor | None, dh: Tensor | None, h: Tensor, w: Tensor, rstd: Tensor, seed: Tensor | None,
    dropout_p: float, x_dtype: torch.dtype, residual_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _empty_residual_gradients(h, dropout_p, x_dtype, residual_dtype)


@op.define(
    "rms_norm_residual_backward(Tensor? dy, Tensor? dh, Tensor h, Tensor w, Tensor rstd, Tensor? seed,"
    " float dropout_p, ScalarType x_dtype, ScalarType residual_dtype) -> (Tensor dresidual, Tensor dx)",
    check=_check_residual_backward,
    fake=_fake_rms_norm_residual_backward,
)
def rms_norm_residual_backward_reference(
    dy: Tensor | None, dh: Tensor | None, h: Tensor, w: Tensor, rstd: Tensor, seed: Tensor | None,
    dropout_p: float, x_dtype: torch.dtype, residual_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dx is empty where it would equal dresidual: no dropout, same dtype."""
    wide = wide_dtype(h, w)
    total = torch.zeros(h.shape, dtype=wide, device=h.device)
    if dy is not None:
        total = total + _backward_of(dy, h.to(wide), w, rstd)
    if dh is not None:
        total = total + dh
    dresidual = total.to(residual_dtype)
    if dropout_p == 0.0 and x_dtype == residual_dtype:
        return dresidual, h.new_empty((0,), dtype=x_dtype)
    # A copy: an op's two outputs must not share memory.
    return dresidual, dropout(total, seed, dropout_p).to(x_dtype, copy=True)


@op.native
def _native_rms_norm_residual_backward(
    kernels: SimpleNamespace, dy: Tensor | None, dh: Tensor | None, h: Tensor, w: Tensor, rstd: Tensor,
    seed: Tensor | None, dropout_p: float, x_dtype: torch.dtype, residual_dtype: torch.dtype,
) -> Any:  # fmt: skip
    if not covers(h, w) or dy is None:
        return NotImplemented
    dy, dh, h, w, rstd = contiguous(dy, dh, h, w, rstd)
    dresidual, dx = _empty_residual_gradients(h, dropout_p, x_dtype, residual_dtype)
    if h.numel():
        kernels.rms_norm_residual_backward(
            dy, dh, h, w, rstd, seed,
            dresidual, dx if dx.numel() else None, _rows(h), h.shape[-1], dropout_p,
            DTYPE_CODES[x_dtype], DTYPE_CODES[residual_dtype], DTYPE_CODES[w.dtype], stream(h),
        )  # fmt: skip
    return dresidual, dx


@op.triton
def _triton_rms_norm_residual_backward(
    dy: Tensor | None, dh: Tensor | None, h: Tensor, w: Tensor, rstd: Tensor, seed: Tensor | None,
    dropout_p: float, x_dtype: torch.dtype, residual_dtype: torch.dtype,
) -> Any:  # fmt: skip
    from fastprompt.triton_kernels import rms_norm as kernels

    if not covers(h, w) or dy is None:
        return NotImplemented
    dresidual, dx = _empty_residual_gradients(h, dropout_p, x_dtype, residual_dtype)
    kernels.rms_norm_residual_backward(*contiguous(dy, dh, h, w, rstd), seed, dropout_p, dresidual, dx)
    return dresidual, dx


def _setup_rms_norm_residual(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    x, residual, w, seed, _, dropout_p = inputs
    _, h, rstd = output
    ctx.set_materialize_grads(False)
    if ctx.needs_input_grad[2]:
        refuse_gradient("rms_norm", "w")
    ctx.mark_non_differentiable(rstd)
    ctx.save_for_backward(h, w, rstd, seed)
    ctx.dropout_p, ctx.dtypes = dropout_p, (x.dtype, residual.dtype)


def _backward_rms_norm_residual(
    ctx: Any, dy: Tensor | None, dh: Tensor | None, _drstd: None
) -> tuple[Tensor | None, ...]:
    if dy is None and dh is None:
        return (None,) * 6
    h, w, rstd, seed = ctx.saved_tensors
    dresidual, dx = direct.rms_norm_residual_backward(dy, dh, h, w, rstd, seed, ctx.dropout_p, *ctx.dtypes)
    dx = dx if dx.numel() else dresidual
    needs_x, needs_residual = ctx.needs_input_grad[:2]
    return dx if needs_x else None, dresidual if needs_residual else None, None, None, None, None


op.autograd("rms_norm_residual", setup_context=_setup_rms_norm_residual, backward=_backward_rms_norm_residual)
op.publish()

# SPDX-License-Identifier: Apache-2.0
"""frozen_linear: y = x W^T for a weight that never trains, and the sum of such products' gradients.

    x   [..., K]
    W   [N, K]     in x's dtype, frozen; or a weight per example, [B, N, K] for x [B, M, K]
    y   [..., N]   in x's dtype

Backward: dx = dy W. ``frozen_linear_backward`` takes several dy and W, for layers that share their input, and adds the
products up as it computes them. No weight gradient asks for x, so nothing is saved but W itself. Rows of dy that are
zero, as at padding, give zeros where the weight is finite; several together cost the CPU kernel no products.

The CPU kernel is for fp32, and products of at least 6 rows (per example), 48 columns and a depth of 32; forward, of a
weight whose rows are dense, also for fewer rows. The others are PyTorch's. It adds up chains of 128 products in
registers, and those in order: a row's result is the same bits whatever other rows it computes, and however many
threads. Up to 16 rows of a dense weight, which are as fast as the weight is read, are added up in lanes, 16 of AVX-512:
again a row's bits are its own. It is the default where it is faster than PyTorch's library, which on x86 is MKL: on
AMD's CPUs with AVX2 or AVX-512 (docs/decisions/0013). torch.autocast changes nothing.

On a CPU of any maker without instructions for bf16 or fp16 the kernel also takes those, of any number of rows: it
computes in fp32, reads the weight as it is, and rounds once. PyTorch needs 6 to 120 times what fp32 takes there. Where
there are such instructions for bf16, another kernel takes up to 32 rows of it, which PyTorch's library reads the weight
for at half the speed of memory: its sums have 16 lanes, too.

No csrc/cuda/frozen_linear.cu: cuBLAS, which the reference calls, has no match there.
No triton_kernels/frozen_linear.py: for the same reason.

Source: torch.nn.Linear without bias; Goto and van de Geijn 2008, "Anatomy of high-performance matrix multiplication".
"""

from types import SimpleNamespace
from typing import Any, NoReturn

import torch
from torch import Tensor

from fastprompt import _native
from fastprompt._native import DTYPE_CODES, stream
from fastprompt.dispatch import Op, direct
from fastprompt.dispatch.op import LIBRARY
from fastprompt.ops._checks import (
    FLOATS,
    check_frozen,
    check_same_device,
    check_tensor,
    fail,
    refuse_gradient,
)

# Of a product, the least that the kernel takes: below, PyTorch's library is as fast.
ROWS, COLUMNS, DEPTH = 6, 48, 32
BF16_ROWS = 32  # the most for which the kernel that multiplies bf16 is faster than PyTorch's library


def _slow_halves() -> tuple[torch.dtype, ...]:
    """Half precision that PyTorch multiplies without instructions for it, on this CPU."""
    if not torch.backends.mkldnn.is_available():
        return torch.bfloat16, torch.float16
    library = torch.ops.mkldnn
    fast = {
        torch.bfloat16: library._is_mkldnn_bf16_supported(),
        torch.float16: library._is_mkldnn_fp16_supported(),
    }
    return tuple(dtype for dtype, supported in fast.items() if not supported)


SLOW_HALVES = _slow_halves()


# A scalar kernel is slower than PyTorch's library.
HAS_VECTORS = bool(_native.CPU_TARGETS) and _native.CPU_TARGETS[0] != "scalar"


def _is_slow_half(x: Tensor | list[Tensor], *_others: Any) -> bool:
    return HAS_VECTORS and (x[0] if isinstance(x, list) else x).dtype in SLOW_HALVES


op = Op(
    "frozen_linear",
    native_first=HAS_VECTORS and _native.CPU_IS_AMD and torch.backends.mkl.is_available(),
    native_for=_is_slow_half,
)
MULTIPLIES_BF16 = op.native_first and _native.CPU_TARGETS[0] in _native.BF16_ISAS


def frozen_linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T`` for a frozen weight.

    Args:
        x: [..., K] float32, bfloat16, float16 or float64.
        weight: [N, K] in x's dtype, frozen; or [B, N, K] for x [B, M, K], one per example.

    Returns:
        y [..., N] in x's dtype.

    Raises:
        TypeError, ValueError: an argument has another dtype, shape or device, or weight requires grad.
    """
    check_frozen("frozen_linear", "weight", weight)
    return direct.frozen_linear(x, weight)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """The reference, for arguments that need no checks."""
    # Asked first: to turn it off takes the host as long as to launch a product.
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return product(x, weight)
    if weight.dim() == 3:
        return torch.bmm(x, weight.transpose(1, 2))
    return torch.nn.functional.linear(x, weight).contiguous()


def product_sum(dy: list[Tensor], weight: list[Tensor]) -> Tensor:
    """The reference of the backward pass, the same way."""
    if torch.is_autocast_enabled(dy[0].device.type):
        with torch.autocast(dy[0].device.type, enabled=False):
            return product_sum(dy, weight)
    dx = torch.matmul(dy[0], weight[0]).contiguous()
    rows = dx.shape[:-1].numel()
    for each, w in zip(dy[1:], weight[1:], strict=True):
        if w.dim() == 3:
            dx.baddbmm_(each, w)
        else:
            dx.view(rows, w.shape[1]).addmm_(each.reshape(rows, w.shape[0]), w)
    return dx


def _check(x: Tensor, weight: Tensor) -> None:
    _check_pair("frozen_linear", "x", x, weight, -1)


def _check_pair(name: str, x_name: str, x: Tensor, weight: Tensor, dim: int) -> None:
    """The last dimension of x must be weight's ``dim``, -2 or -1."""
    check_tensor(name, x_name, x, FLOATS)
    width = "NK"[dim]
    if x.dim() < 1:
        fail(name, f"{x_name} must have shape [..., {width}], got a scalar")
    check_tensor(name, "weight", weight, (x.dtype,))
    if weight.dim() not in (2, 3) or weight.shape[dim] != x.shape[-1]:
        want = "N, K".replace(width, str(x.shape[-1]))
        fail(name, f"weight must have shape [N, K]=[{want}] or [B, {want}], got {list(weight.shape)}")
    if weight.dim() == 3 and (x.dim() != 3 or x.shape[0] != weight.shape[0]):
        got = f"{list(x.shape)} for a weight of {list(weight.shape)}"
        fail(name, f"{x_name} must have shape [B, M, {width}], a weight per example, got {got}")
    check_same_device(name, "weight", weight, x_name, x)


def _check_backward(dy: list[Tensor], weight: list[Tensor]) -> None:
    name = "frozen_linear_backward"
    if not dy or len(dy) != len(weight):
        fail(name, f"dy and weight must be as many, one or more, got {len(dy)} and {len(weight)}")
    for each, w in zip(dy, weight, strict=True):
        _check_pair(name, "dy", each, w, -2)
        check_tensor(name, "dy", each, (dy[0].dtype,))
        check_same_device(name, "dy", each, "the first", dy[0])
        if each.shape[:-1] != dy[0].shape[:-1] or w.shape[-1] != weight[0].shape[-1]:
            got = f"{list(each.shape)} and {list(w.shape)} beside {list(dy[0].shape)} and {list(weight[0].shape)}"
            fail(name, f"all dy must have equal rows, all weights equal K, got {got}")


def _fake(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[-2]))


@op.define("frozen_linear(Tensor x, Tensor weight) -> Tensor", check=_check, fake=_fake)
def frozen_linear_reference(x: Tensor, weight: Tensor) -> Tensor:
    return product(x, weight)


def _sizes(x: Tensor, weight: Tensor) -> tuple[int, int]:
    """B examples of M rows each."""
    B = weight.shape[0] if weight.dim() == 3 else 1
    return B, x.numel() // (B * x.shape[-1])


def takes(dtype: torch.dtype) -> bool:
    """On a CPU, is there a kernel for this dtype?"""
    return _takes_many(dtype) or (dtype == torch.bfloat16 and MULTIPLIES_BF16)


def _takes_many(dtype: torch.dtype) -> bool:
    """Also for more rows than BF16_ROWS?"""
    return dtype == torch.float32 or dtype in SLOW_HALVES


def pays(x: Tensor, weight: Tensor) -> bool:
    """On a CPU, is the op worth the time that it keeps the host busy? For a few rows of a small weight it is not."""
    rows, large = x.numel() // x.shape[-1], weight.numel() >= 1 << 16
    if _takes_many(x.dtype):
        return large or rows >= ROWS
    return large and rows <= BF16_ROWS and takes(x.dtype)


def pays_backward(dy: Tensor) -> bool:
    """The same for the gradient of the input."""
    return _takes_many(dy.dtype) and dy.numel() >= _least_rows(dy.dtype) * dy.shape[-1]


def _least_rows(dtype: torch.dtype) -> int:
    return 1 if dtype in SLOW_HALVES else ROWS


def _covered(x: Tensor, weight: Tensor, columns: int, few_rows: bool = False) -> bool:
    """Does the kernel take products of this dtype and size, and is one of the weight's dimensions dense?"""
    if not _takes_many(x.dtype) or weight.numel() == 0 or 1 not in weight.stride()[-2:]:
        return False
    least = 1 if few_rows else _least_rows(x.dtype)
    return _sizes(x, weight)[1] >= least and columns >= COLUMNS and x.shape[-1] >= DEPTH


def _place(weight: Tensor) -> tuple[int, ...]:
    """Elements from an example, row, column to the next."""
    return weight.stride() if weight.dim() == 3 else (0, *weight.stride())


def _covered_in_bf16(x: Tensor, weight: Tensor) -> bool:
    """The same of the kernel that multiplies bf16: few rows, and a weight whose rows are dense."""
    if x.dtype != torch.bfloat16 or _takes_many(x.dtype) or weight.numel() == 0 or weight.stride(-1) != 1:
        return False
    return 1 <= _sizes(x, weight)[1] <= BF16_ROWS


@op.native
def _native_frozen_linear(kernels: SimpleNamespace, x: Tensor, weight: Tensor) -> Any:
    N, K = weight.shape[-2:]
    if kernels.frozen_linear.target in _native.BF16_ISAS:
        covered = _covered_in_bf16(x, weight)
    else:
        covered = _covered(x, weight, N, few_rows=weight.stride(-1) == 1)
    if not covered:
        return NotImplemented
    x = x.contiguous()
    y = x.new_empty((*x.shape[:-1], N))
    kernels.frozen_linear(
        x, weight, y, *_sizes(x, weight), N, K, *_place(weight),
        DTYPE_CODES[weight.dtype], stream(x),
    )  # fmt: skip
    return y


def _fake_backward(dy: list[Tensor], weight: list[Tensor]) -> Tensor:
    return dy[0].new_empty((*dy[0].shape[:-1], weight[0].shape[-1]))


@op.define(
    "frozen_linear_backward(Tensor[] dy, Tensor[] weight) -> Tensor",
    check=_check_backward,
    fake=_fake_backward,
)
def frozen_linear_backward_reference(dy: list[Tensor], weight: list[Tensor]) -> Tensor:
    return product_sum(dy, weight)


@op.native
def _native_frozen_linear_backward(kernels: SimpleNamespace, dy: list[Tensor], weight: list[Tensor]) -> Any:
    if not all(_covered(each, w, w.shape[-1]) for each, w in zip(dy, weight, strict=True)):
        return NotImplemented
    dx = dy[0].new_empty((*dy[0].shape[:-1], weight[0].shape[-1]), dtype=torch.float32)
    for number, (each, w) in enumerate(zip(dy, weight, strict=True)):
        rows = each.float().contiguous()
        kernels.frozen_linear_backward(
            rows, w, dx, *_sizes(rows, w), *w.shape[-2:], *_place(w),
            DTYPE_CODES[w.dtype], int(number > 0), stream(dx),
        )  # fmt: skip
    return dx.to(dy[0].dtype)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    if ctx.needs_input_grad[1]:
        refuse_gradient("frozen_linear", "weight")
    ctx.save_for_backward(inputs[1])


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
    return direct.frozen_linear_backward([dy], list(ctx.saved_tensors)), None


def _refuse_batched(*_arguments: Any) -> NoReturn:
    """PyTorch runs other ops once per gradient, but none that takes lists."""
    remedy = "call backward once for each, without is_grads_batched"
    raise NotImplementedError(f"fastprompt::frozen_linear_backward: takes one gradient at a time: {remedy}")


LIBRARY.impl("frozen_linear_backward", _refuse_batched, "Batched")
op.autograd("frozen_linear", setup_context=_setup_context, backward=_backward)
op.publish()

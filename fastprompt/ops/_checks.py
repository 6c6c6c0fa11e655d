# SPDX-License-Identifier: Apache-2.0
"""Argument checks shared by the pages. A message reads ``fastprompt::op: what was expected, got what. Remedy.``"""

import operator
from typing import Any, NoReturn

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def fail(op: str, message: str, error: type[Exception] = ValueError) -> NoReturn:
    raise error(f"fastprompt::{op}: {message}")


def check_tensor(op: str, name: str, value: object, dtypes: tuple[torch.dtype, ...]) -> None:
    """``value`` must be a strided tensor of one of ``dtypes``."""
    if not isinstance(value, torch.Tensor):
        fail(op, f"{name} must be a torch.Tensor, got {type(value).__name__}", TypeError)
    if value.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        got = str(value.dtype).removeprefix("torch.")
        fail(op, f"{name} must have dtype {names}, got {got}. Convert it with {name}.to(...)", TypeError)
    if value.layout != torch.strided:
        fail(
            op, f"{name} must be a dense tensor, got layout {value.layout}. Use {name}.to_dense()", TypeError
        )


def check_shape(op: str, name: str, value: torch.Tensor, shape: tuple[int, ...], symbols: str) -> None:
    """``value`` must have ``shape``, called ``symbols`` (e.g. "[D]") in the message."""
    if value.shape != shape:
        sizes = f"{list(shape)}"
        want = symbols if symbols == sizes else f"{symbols}={sizes}"
        fail(op, f"{name} must have shape {want}, got {list(value.shape)}")


def check_same_device(op: str, name: str, value: torch.Tensor, like: str, other: torch.Tensor) -> None:
    if value.device != other.device:
        fail(
            op,
            f"{name} must be on {other.device} like {like}, got {value.device}. Use {name}.to({str(other.device)!r})",
        )


def check_number(op: str, name: str, value: object) -> None:
    """``value`` must be a real number: Python's, NumPy's, symbolic, or a tensor of one element."""
    if not isinstance(value, int | float | torch.SymInt) and not hasattr(value, "__float__"):
        fail(op, f"{name} must be a number, got {type(value).__name__}", TypeError)


def as_int(op: str, name: str, value: Any) -> int:
    """``value`` as the int that kernels take: NumPy's are none. Symbolic ones stay symbolic."""
    if isinstance(value, int | torch.SymInt):
        return value  # type: ignore[return-value]
    try:
        return operator.index(value)
    except TypeError:
        fail(op, f"{name} must be an int, got {type(value).__name__}", TypeError)


def check_frozen(op: str, name: str, value: object) -> None:
    """fastprompt computes no weight gradients: a weight that wants one is refused, never silently left without."""
    if isinstance(value, torch.Tensor) and value.requires_grad and torch.is_grad_enabled():
        refuse_gradient(op, name)


def refuse_gradient(op: str, name: str) -> NoReturn:
    remedy = f"Call {name}.requires_grad_(False), or use the PyTorch op to train it"
    fail(op, f"{name} must be frozen, got requires_grad=True. {remedy}")

# SPDX-License-Identifier: Apache-2.0
"""How the row-wise kernels are cut into programs, and the one way they are launched."""

from contextlib import nullcontext
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch

from fastprompt._native import is_elsewhere


class Architecture(NamedTuple):
    """What fills the memory pipe of one GPU generation."""

    elements: int  # per tensor and program: enough loads in flight to cover the latency of device memory
    processors: int  # multiprocessors; fewer programs than twice this leave some idle


# By Little's law an A100 must keep about 12 KiB per multiprocessor in flight, an H100 or H200 25 KiB, a B200
# 40 KiB: two to five programs with a bf16 tile of this size, which four warps hold in 16 or 32 registers per thread.
ARCHITECTURES = {8: Architecture(2048, 108), 9: Architecture(4096, 132), 10: Architecture(4096, 148)}
INTERPRETER = Architecture(2048, 0)  # one program after another: the fewer the faster
MAX_BLOCK = 8192  # columns of a tile; a wider row is cut into several


class RowTile(NamedTuple):
    BN: int  # rows
    BD: int  # columns
    num_warps: int


def cdiv(n: int, d: int) -> int:
    """n / d, rounded up. triton.cdiv serves kernels too, and takes a tenth of a launch."""
    return -(-n // d)


def next_power_of_2(n: int) -> int:
    """The least that is not below n, which is positive."""
    return 1 << (n - 1).bit_length()


def architecture(device: torch.device) -> Architecture:
    if device.type == "cpu":
        return INTERPRETER
    known = [major for major in ARCHITECTURES if major <= generation(device)]
    return ARCHITECTURES[max(known, default=8)]


def generation(device: torch.device) -> int:
    """8 for Ampere, 9 for Hopper, 10 for Blackwell."""
    return compute_capability(device) // 10


@cache
def compute_capability(device: torch.device) -> int:
    """80 for an A100, 90 for an H100 or H200, 100 for a B200."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def row_tile(N: int, D: int, device: torch.device) -> RowTile:
    """The tile [BN, BD] of a kernel over rows [N, D]: whole rows, and several if enough programs remain."""
    elements, processors = architecture(device)
    BD = min(max(next_power_of_2(D), 16), MAX_BLOCK)
    BN = max(elements // BD, 1)
    if cdiv(N, BN) < 2 * processors:
        BN = 1
    return RowTile(BN, BD, num_warps=max(4, BD // 512))


def launch(
    kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, fuse: bool = False, **constants: Any
) -> None:
    """Run ``kernel`` on ``device``, which need not be the current one.

    Unless ``fuse``, no multiplication is fused into the addition after it: dropout and compensated sums then round as
    in the references, and most kernels wait for memory, not for arithmetic.
    """
    if 0 in grid:
        return
    with torch.cuda.device(device) if is_elsewhere(device) else nullcontext():
        if device.type == "cuda" and hasattr(kernel, "params"):
            _launch_compiled(kernel, grid, device.index, args, fuse, constants)
        else:  # interpreted, or compiled for a GPU that is not here
            kernel[grid](*args, **constants, enable_fp_fusion=fuse)


# What Triton compiled, by variant: it would look for that at every launch, for longer than a small kernel takes.
_compiled: dict[tuple[Any, ...], Any] = {}
MAX_COMPILED = 4096


def _launch_compiled(
    kernel: Any,
    grid: tuple[int, ...],
    device: int,
    args: tuple[Any, ...],
    fuse: bool,
    constants: dict[str, Any],
) -> None:
    variant, pointers = specialize(kernel, args)
    variant = (device, fuse, *constants.items(), *variant)
    compiled = _compiled.get(variant)
    if compiled is None:
        if len(_compiled) >= MAX_COMPILED:
            _compiled.clear()
        _compiled[variant] = kernel[grid](*args, **constants, enable_fp_fusion=fuse)
    else:
        last = [constants[name] for name in kernel.arg_names[len(args) :]]
        compiled[(*grid, 1, 1)[:3]](*pointers, *args[len(pointers) :], *last)


def specialize(kernel: Any, args: tuple[Any, ...]) -> tuple[tuple[Any, ...], list[int | None]]:
    """What, of a kernel and its arguments, decides which machine code runs; the addresses of its tensors.

    Told apart as finely as Triton does or little finer: the tensors' dtypes and addresses modulo 16; whether an integer
    wants 64 bits and, if the kernel specialises it, is 1 or divisible by 16; of other numbers their type. So batches
    of many lengths share few variants.
    """
    shape = _shapes.get(kernel.fn)
    if shape is None:
        shape = _shapes[kernel.fn] = _shape(kernel, args)
    tensors, loose, strict = shape
    found = args[:tensors]
    pointers = [None if x is None else x.data_ptr() for x in found]
    dtypes = [None if x is None else x.dtype for x in found]
    remainders = [None if address is None else address % 16 for address in pointers]
    large = [args[i] >> 31 for i in loose]
    kinds = _kinds(*[args[i] for i in strict])
    return (kernel.fn, *dtypes, *remainders, *large, *kinds), pointers


@lru_cache(MAX_COMPILED, typed=True)  # as the numbers are mostly those of the call before
def _kinds(*numbers: float) -> tuple[Any, ...]:
    """Of numbers that a kernel specialises, what Triton tells apart."""
    return tuple((x >> 31, x == 1, x % 16 == 0) if type(x) is int else type(x) for x in numbers)


class _Shape(NamedTuple):
    """How a kernel's arguments are ordered: tensors or None, then numbers."""

    tensors: int
    loose: tuple[int, ...]  # where the integers are that are not specialised
    strict: tuple[int, ...]  # and the other numbers


_shapes: dict[Any, _Shape] = {}


def _shape(kernel: Any, args: tuple[Any, ...]) -> _Shape:
    tensors = next((i for i, x in enumerate(args) if isinstance(x, int | float)), len(args))
    numbers = range(tensors, len(args))
    loose = tuple(i for i in numbers if kernel.params[i].do_not_specialize)
    return _Shape(tensors, loose, tuple(i for i in numbers if i not in loose))

# SPDX-License-Identifier: Apache-2.0
"""How the row-wise kernels are cut into programs, and the one way they are launched."""

from contextlib import nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch


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
    return RowTile(BN, BD, num_warps=max(4, BD // 1024))


def launch(
    kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, fuse: bool = False, **constants: Any
) -> None:
    """Run ``kernel`` on ``device``, which need not be the current one.

    Unless ``fuse``, no multiplication is fused into the addition after it: dropout and compensated sums then round as
    in the references, and most kernels wait for memory, not for arithmetic.
    """
    if 0 in grid:
        return
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else nullcontext():
        kernel[grid](*args, **constants, enable_fp_fusion=fuse)

# SPDX-License-Identifier: Apache-2.0
"""What elementwise kernels share: a program takes BD neighbouring elements of a contiguous tensor, of any shape."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import cdiv, launch
from ._philox import keep_mask

BD = 1024


@triton.jit
def elements(N, BD: tl.constexpr):
    """Offsets o [BD] int64 of this program's elements, and which of them exist."""
    o = tl.program_id(0).to(tl.int64) * BD + tl.arange(0, BD)
    return o, o < N


@triton.jit
def kept_by_dropout(seed, threshold, BD: tl.constexpr):
    """Which of this program's elements [BD] dropout keeps."""
    o_first = tl.program_id(0).to(tl.int64) * BD + tl.arange(0, 1)
    return tl.reshape(keep_mask(tl.load(seed), o_first, threshold, 8, 1, BD), (BD,))


def launch_elements(kernel: Any, x: Tensor, *arguments: Any, **options: Any) -> None:
    """kernel(*arguments, N, **options) over the N elements of x."""
    N = x.numel()
    launch(kernel, (cdiv(N, BD),), x.device, *arguments, N, BD=BD, num_warps=4, **options)


def aot_tensors() -> list[tuple[Tensor, Tensor]]:
    """(x, seed) without memory, one x per dtype."""
    seed = torch.empty(1, dtype=torch.int64, device="meta")
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    return [(torch.empty(4096, 2048, dtype=dtype, device="meta"), seed) for dtype in dtypes]

# SPDX-License-Identifier: Apache-2.0
"""The gradient of the prompts' keys or values, from each example's share of it."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import cdiv, launch


@triton.jit(do_not_specialize=["B", "E"])
def t5_attention_prompt_sum_kernel(share, prompt_ids, total, B, E, BE: tl.constexpr):
    """total [R, E] = the sum over b, ascending, of share [B, E] where example b reads prompt r."""
    tiles = tl.cdiv(E, BE)
    r = tl.program_id(0) // tiles
    o_e = (tl.program_id(0) - r * tiles).to(tl.int64) * BE + tl.arange(0, BE)
    m_e = o_e < E
    b_sum = tl.zeros((BE,), tl.float32)
    for b in range(0, B):
        prompt = 0 if prompt_ids is None else tl.load(prompt_ids + b)
        if prompt == r:
            b_sum += tl.load(share + tl.cast(b, tl.int64) * E + o_e, mask=m_e, other=0.0)
    tl.store(total + r.to(tl.int64) * E + o_e, b_sum.to(total.dtype.element_ty), mask=m_e)


def t5_attention_prompt_sum(share: Tensor, prompt_ids: Tensor | None, total: Tensor) -> None:
    """share [B, P, H, K] -> total [R, P, H, K], filled."""
    E = total[0].numel()
    launch(
        t5_attention_prompt_sum_kernel, (cdiv(E, 1024) * total.shape[0],), share.device,  # R may pass an axis' 65,535
        share, prompt_ids, total, share.shape[0], E, BE=1024, num_warps=4,
    )  # fmt: skip


def aot_cases() -> Iterator[tuple[Any, ...]]:
    """Launcher calls for tests/triton_aot."""
    meta = partial(torch.empty, device="meta")
    ids, total = meta(4, dtype=torch.int64), meta(3, 100, 12, 64, dtype=torch.bfloat16)
    yield t5_attention_prompt_sum, meta(4, 100, 12, 64), ids, total

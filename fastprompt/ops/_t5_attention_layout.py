# SPDX-License-Identifier: Apache-2.0
"""t5_attention's tensors as kernels read them."""

from typing import Any

from fastprompt._native import contiguous
from fastprompt.ops._t5_attention_reference import Inputs


def laid_out(a: Inputs) -> Inputs:
    """The K columns of each row side by side, wherever the rows lie, and indices without gaps."""
    ids, lens, mask, offsets, cu_q, cu_k = contiguous(
        a.prompt_ids, a.prompt_lens, a.key_mask, a.offsets, a.cu_q, a.cu_k
    )
    return Inputs(
        _rows(a.q), _rows(a.k), _rows(a.v), a.bias, _rows(a.prompt_k), _rows(a.prompt_v), ids, lens, mask,
        offsets, cu_q, cu_k, a.seed, a.offset, a.causal, a.dropout_p,
    )  # fmt: skip


def _rows(x: Any) -> Any:
    return x if x is None or x.stride(-1) == 1 else x.contiguous()

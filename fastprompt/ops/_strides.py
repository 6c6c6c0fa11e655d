# SPDX-License-Identifier: Apache-2.0
"""t5_attention's tensors as native kernels read them: addresses, sizes and strides."""

from array import array

from torch import Tensor

from fastprompt._native import contiguous
from fastprompt.ops._t5_attention_reference import Inputs


class Strides:
    """``pointers``: q, k, v, bias, prompt_k, prompt_v, prompt_ids, prompt_lens, key_mask, offsets, cu_q, cu_k, 0 for
    None. ``address``: of 25 int64 in host memory: B, T, S, H, K, N, R, P, M, packed; then for each of q, k, v, prompt_k
    and prompt_v its strides in elements by example (or prompt), row and head. csrc/common/attention.h reads them.

    The object keeps all of that alive; hold it until the kernel has returned.
    """

    def __init__(self, a: Inputs) -> None:
        packed = a.cu_q is not None
        q, k, v, prompt_k, prompt_v = (
            None if x is None else _unit_stride(x) for x in (a.q, a.k, a.v, a.prompt_k, a.prompt_v)
        )
        assert q is not None
        assert k is not None
        bias = None if a.bias is None else a.bias.float().contiguous()
        indices = contiguous(a.prompt_ids, a.prompt_lens, a.key_mask, a.offsets, a.cu_q, a.cu_k)
        self._alive = [q, k, v, bias, prompt_k, prompt_v, *indices]
        self.pointers = [0 if x is None else x.data_ptr() for x in self._alive]
        H, K = q.shape[-2:]
        B, T, S = (a.cu_q.shape[0] - 1, 0, 0) if a.cu_q is not None else (q.shape[0], q.shape[1], k.shape[1])
        R, P = prompt_k.shape[:2] if prompt_k is not None else (0, 0)
        M = bias.shape[1] // 2 if bias is not None else 0
        sizes = [B, T, S, H, K, q.shape[0] if packed else B * T, R, P, M, int(packed)]
        for x in (q, k, v, prompt_k, prompt_v):
            sizes += (0, 0, 0) if x is None else ((0, *x.stride()[:2]) if x.dim() == 3 else x.stride()[:3])
        self._sizes = array("q", sizes)
        self.address = self._sizes.buffer_info()[0]


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()

# SPDX-License-Identifier: Apache-2.0
"""t5_attention's tensors as kernels read them: sizes, strides and, for native kernels, addresses."""

from array import array

from torch import Tensor

from fastprompt._native import contiguous
from fastprompt.ops._t5_attention_reference import Inputs


class Layout:
    """A call's tensors, the K columns of each row side by side, and where the rows lie.

    ``sources``: q, k, v, prompt_k, prompt_v. ``indices``: prompt_ids, prompt_lens, key_mask, offsets, cu_q, cu_k.
    ``strides``: of each source in elements, by example (or prompt; 0 if packed), row and head; zeros for None. N and Nk
    are the rows of all queries and keys. T = S = 0 if packed, R = P = 0 without prompts, M = 0 without bias.
    """

    def __init__(self, a: Inputs) -> None:
        sources = (a.q, a.k, a.v, a.prompt_k, a.prompt_v)
        q, k, v, prompt_k, prompt_v = (
            x if x is None or x.stride(-1) == 1 else x.contiguous() for x in sources
        )
        assert q is not None
        assert k is not None
        self.sources = (q, k, v, prompt_k, prompt_v)
        self.indices = contiguous(a.prompt_ids, a.prompt_lens, a.key_mask, a.offsets, a.cu_q, a.cu_k)
        self.packed = a.cu_q is not None
        self.H, self.K = q.shape[-2:]
        if a.cu_q is None:
            (self.B, self.T), self.S = q.shape[:2], k.shape[1]
            self.N, self.Nk = self.B * self.T, self.B * self.S
        else:
            self.B, self.T, self.S = a.cu_q.shape[0] - 1, 0, 0
            self.N, self.Nk = q.shape[0], k.shape[0]
        self.R, self.P = (0, 0) if prompt_k is None else prompt_k.shape[:2]
        self.M = 0 if a.bias is None else a.bias.shape[1] // 2
        self.strides: tuple[int, ...] = ()
        for x in self.sources:
            self.strides += (
                (0, 0, 0) if x is None else (0, *x.stride()[:2]) if x.dim() == 3 else x.stride()[:3]
            )


class NativeLayout(Layout):
    """``pointers``: q, k, v, bias, prompt_k, prompt_v, then the indices; 0 for None. ``address``: of 25 int64 in host
    memory, which csrc/common/attention.h reads.

    The object keeps all of that alive; hold it until the kernel has returned.
    """

    def __init__(self, a: Inputs) -> None:
        super().__init__(a)
        q, k, v, prompt_k, prompt_v = self.sources
        bias = None if a.bias is None else a.bias.float().contiguous()
        self._alive: list[Tensor | None] = [q, k, v, bias, prompt_k, prompt_v, *self.indices]
        self.pointers = [0 if x is None else x.data_ptr() for x in self._alive]
        sizes = (self.B, self.T, self.S, self.H, self.K, self.N, self.R, self.P, self.M, int(self.packed))
        self._sizes = array("q", sizes + self.strides)
        self.address = self._sizes.buffer_info()[0]

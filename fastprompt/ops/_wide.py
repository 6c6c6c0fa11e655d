# SPDX-License-Identifier: Apache-2.0
"""The dtype of the ops' arithmetic."""

import torch
from torch import Tensor


def wide_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any tensor is (the truth in tests), else float32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def wide(x: Tensor) -> Tensor:
    """x in that dtype; x itself where it has it."""
    return x.to(wide_dtype(x))

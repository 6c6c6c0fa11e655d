# SPDX-License-Identifier: Apache-2.0
"""Numbers that the host knows, as tensors where the model is."""

from typing import Any

import torch
from torch import Tensor


def indices(numbers: Any, device: torch.device) -> Tensor:
    """int64, of a list of ints or of such lists.

    torch.tensor(numbers, device=device) would wait until a GPU has done all that it was given before.
    """
    return torch.tensor(numbers, dtype=torch.int64, device="cpu").to(device, non_blocking=True)

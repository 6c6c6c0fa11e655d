# SPDX-License-Identifier: Apache-2.0
"""Numbers that the host knows, as tensors where the model is."""

from typing import Any

import torch
from torch import Tensor

from fastprompt.dispatch.plain import is_capturing


def indices(numbers: Any, device: torch.device) -> Tensor:
    """int64, of a list of ints or of such lists.

    torch.tensor(numbers, device=device) would wait until a GPU has done all that it was given before. A graph that is
    being recorded takes nothing from the host but numbers: one launch for each.
    """
    here = torch.tensor(numbers, dtype=torch.int64, device="cpu")
    if not _is_recorded(device):
        return here.to(device, non_blocking=True)
    there = torch.empty_like(here, device=device)
    for place, number in zip(there.view(-1), here.view(-1).tolist(), strict=True):
        place.fill_(number)
    return there


def _is_recorded(device: torch.device) -> bool:
    """By CUDA: on a CPU a recorded run may take what the host has."""
    return device.type == "cuda" and is_capturing(device)

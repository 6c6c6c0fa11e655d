# SPDX-License-Identifier: Apache-2.0
"""The check that every prompt's values from outside pass: finite floats in fp32."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastprompt.prompts.layout import check_shape


def checked_rows(what: str, values: Any, rows: int | None = None, width: int | None = None) -> Tensor:
    """A copy of ``values`` as an fp32 CPU tensor [P, D].

    Args:
        what: the name that errors begin with.
        values: tensor, array or nested lists.
        rows, width: P and D, where they are known.

    Raises:
        TypeError: the values are not floats.
        ValueError: another shape, or a value that is not finite in fp32.
    """
    if not isinstance(values, Tensor):
        array = np.asarray(values)
        if array.dtype.kind != "f":
            raise TypeError(f"{what} must hold floats, got dtype {array.dtype}")
        check_shape(what, array.shape, rows, width)
        with np.errstate(over="ignore"):  # float64 beyond fp32 becomes infinite, and is refused below
            values = torch.from_numpy(array.astype(np.float32))
    check_shape(what, tuple(values.shape), rows, width)
    return finite_fp32(what, values)


def finite_fp32(what: str, values: Tensor) -> Tensor:
    """A copy of a prompt's tensor [..., P, width] in fp32 on the CPU. Errors as in :func:`checked_rows`."""
    if not values.is_floating_point():
        raise TypeError(f"{what} must hold floats, got dtype {values.dtype}")
    copy = values.detach().to("cpu", torch.float32, copy=True, memory_format=torch.contiguous_format)
    broken = int((~copy.isfinite()).any(-1).sum())
    if broken:
        count = copy[..., 0].numel()
        raise ValueError(f"{what} has NaN or infinity in {broken} of its {count} rows (in fp32)")
    return copy

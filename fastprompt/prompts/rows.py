# SPDX-License-Identifier: Apache-2.0
"""The check that every prompt from outside passes: a finite float matrix [P, D]."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastprompt.prompts.config import MAX_TOKENS


def check_shape(what: str, shape: tuple[int, ...], rows: int | None = None, width: int | None = None) -> None:
    """Raise ValueError unless ``shape`` is [P, D], with P == ``rows`` and D == ``width`` where given."""
    plausible = len(shape) == 2 and 1 <= shape[0] <= MAX_TOKENS and shape[1] >= 1
    if plausible and rows in (None, shape[0]) and width in (None, shape[1]):
        return
    expected = f"[{'P' if rows is None else rows}, {'D' if width is None else width}]"
    raise ValueError(
        f"{what} must have shape [P, D]={expected} with 1 <= P <= {MAX_TOKENS}, got {list(shape)}. "
        "A prompt fits only models of its own width D (d_model)"
    )


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
    elif not values.is_floating_point():
        raise TypeError(f"{what} must hold floats, got dtype {values.dtype}")
    check_shape(what, tuple(values.shape), rows, width)
    matrix = values.detach().to("cpu", torch.float32, copy=True)
    broken = int((~matrix.isfinite()).any(1).sum())
    if broken:
        raise ValueError(f"{what} has NaN or infinity in {broken} of its {len(matrix)} rows (in fp32)")
    return matrix

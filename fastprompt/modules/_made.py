# SPDX-License-Identifier: Apache-2.0
"""The encoder's output, computed again in backward from what its last norm saves, instead of being saved beside it.

The norm and the dropout behind it leave on their output how that came about. Cross-attention layers save that instead.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastprompt._note import MADE, leave_note, note_on
from fastprompt.dispatch import direct


class Made(NamedTuple):
    """dropout(norm(x))"""

    x: Tensor  # [B, S, D]
    w: Tensor  # [D]
    seed: Tensor | None  # int64 [1]
    eps: float
    p: float

    def again(self) -> Tensor:
        n: Tensor = direct.rms_norm(self.x, self.w, self.eps)[0]
        return direct.dropout_add(n, None, self.seed, self.p) if self.p > 0.0 else n


def leave_made(y: Tensor, made: Made | None) -> None:
    """Note on y that it was made so."""
    if made is not None and torch.is_grad_enabled() and y.requires_grad:
        leave_note(y, MADE, made._replace(x=made.x.detach()))


def made_of(y: Tensor | None) -> Made | None:
    """How y was made, if that is known and y was not written to since."""
    found: Made | None = None if y is None else note_on(y, MADE)
    return found

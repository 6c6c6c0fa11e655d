# SPDX-License-Identifier: Apache-2.0
"""Notes on a tensor for the layers that are given it next; void once it was written to.

They are attributes of the tensor object, so that a tensor in its place has none. The compiler gets none, nor do tensors
made in torch.inference_mode, of which nobody can say whether they were written to.
"""

from typing import Any

import torch
from torch import Tensor


def leave_note(y: Tensor, name: str, note: Any) -> None:
    if not torch.compiler.is_compiling() and not y.is_inference():
        setattr(y, name, (note, y._version))


def note_on(y: Tensor, name: str) -> Any:
    """The note; None: there is none, or it is void."""
    if torch.compiler.is_compiling() or y.is_inference():
        return None
    note, version = getattr(y, name, (None, None))
    return note if version == y._version else None

# SPDX-License-Identifier: Apache-2.0
"""Notes on a tensor for the layers that are given it next; void once it was written to.

They are attributes of the tensor object, so that a tensor in its place has none, nor have its copies and files. The
compiler gets none, nor do tensors made in torch.inference_mode, of which nobody can say whether they were written to.
"""

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

ORIGIN = "fastprompt_origin"  # modules/_origin: what a layer's input is made again from
MADE = "fastprompt_made"  # modules/_made: what a layer made beside its output, for the next
ROWS = "fastprompt_rows"  # prompts/row_gradient, by modules/dropout, for attention: how many rows can learn
PER_ROW = "fastprompt_per_row"  # modules/_step: an offset, laid out for each row
TABLE = "fastprompt_table"  # _bias_by_distance: a dense bias as a table
OTHER_BIAS = "fastprompt_other_bias"  # hf_attention, for it and modules/attention: no table can say this bias
KEPT = "fastprompt_kept"  # _allowed: keys that cache_prompts keeps


class _Note:
    __slots__ = ("content", "version")

    def __init__(self, content: Any, version: int) -> None:
        self.content, self.version = content, version

    def __reduce__(self) -> Any:
        return OrderedDict, ()  # what torch.load takes for harmless, and note_on for nothing


def leave_note(y: Tensor, name: str, note: Any) -> None:
    if not torch.compiler.is_compiling() and not y.is_inference():
        setattr(y, name, _Note(note, y._version))


def note_on(y: Tensor, name: str) -> Any:
    """The note; None: there is none, or it is void."""
    if torch.compiler.is_compiling() or y.is_inference():
        return None
    note = getattr(y, name, None)
    return note.content if isinstance(note, _Note) and note.version == y._version else None

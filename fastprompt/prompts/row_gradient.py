# SPDX-License-Identifier: Apache-2.0
"""The gradient of the encoder's input, for the prompt's rows alone.

Tokens' embeddings are frozen, so the first fused attention layer need not compute their rows' gradient: it leaves
zeros. It is told by a note on the stack's input, which the stack's dropout hands on. Where the note is lost, as in a
reentrant checkpoint, or void, as after a write, the gradient is whole.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastprompt._extra_outputs import asks_for
from fastprompt._hooks import has_global_hooks, is_watched
from fastprompt._note import ROWS, leave_note


def mark_prompt_rows(embeds: Tensor, encoder: Any, rows: int, flags: Mapping[str, Any]) -> None:
    """Ask for the gradient of the first ``rows`` rows of each example only; but whole where somebody could see it.

    Args:
        embeds: the encoder's input [B, L, D].
        encoder: the stack.
        rows: P, the longest prompt's.
        flags: output_hidden_states, where given; the first of these is what the zeros would be in.
    """
    if torch.compiler.is_compiling():
        return
    shown = asks_for("output_hidden_states", flags, encoder.config)
    block = encoder.block[0]
    if not (
        shown or has_global_hooks() or any(map(is_watched, (encoder, encoder.dropout, block, block.layer[0])))
    ):
        leave_note(embeds, ROWS, rows)

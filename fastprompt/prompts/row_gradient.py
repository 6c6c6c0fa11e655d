# SPDX-License-Identifier: Apache-2.0
"""The gradient of the encoder's input, for the prompt's rows alone.

Tokens' embeddings are frozen, so the first fused attention layer need not compute their rows' gradient: it leaves
zeros. It is told by a mark on the stack's input, which the stack's dropout hands on. Where the mark is lost, as in a
reentrant checkpoint, the gradient is whole.
"""

from typing import Any

import torch
from torch import Tensor


def mark_prompt_rows(embeds: Tensor, encoder: Any, rows: int) -> None:
    """Ask for the gradient of the first ``rows`` rows of each example only; but whole where a hook could see it."""
    block = encoder.block[0]
    if torch.compiler.is_compiling() or encoder.dropout._forward_hooks:
        return
    if not any(module._forward_pre_hooks for module in (encoder, encoder.dropout, block, block.layer[0])):
        embeds.fastprompt_rows = rows  # type: ignore[attr-defined]

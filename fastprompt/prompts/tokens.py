# SPDX-License-Identifier: Apache-2.0
"""The tokens of a call, which both kinds of batch have: row_batch and key_batch."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastprompt.prompts import checks, packed
from fastprompt.prompts.mask import prepend_mask


class Tokens(NamedTuple):
    """A call's tokens, and the model that they enter."""

    model: Any
    table: Tensor  # the encoder's embedding table [V, D]
    ids: Any  # [B, S]
    mask: Tensor | None  # [B, S], 0 where a token is padding
    pack: bool | None  # as PromptModel has it

    def check_mask(self, rows: Tensor) -> None:
        """Does the mask fit ``rows``, the ids [B, S] or hidden states [B, S, D]?"""
        checks.check_mask(self.mask, rows.shape[0], rows.shape[1], self.table)

    def packing(self, lengths: Sequence[int], flags: Mapping[str, Any]) -> packed.Packing | None:
        """How to pack them, behind prompts of these lengths in the encoder; None to run them padded."""
        device = self.table.device
        return packed.packing(self.model, self.mask, self.ids.shape, lengths, self.pack, flags, device)

    def real_rows(self, lengths: Sequence[int]) -> Tensor:
        """Which rows of the encoder's output are real, where it has prompts of these lengths: [B, L] int64."""
        self.check_mask(self.ids)
        (B, S), device = self.ids.shape, self.table.device
        found = prepend_mask(self.mask, lengths, S, device)
        return torch.ones(B, max(lengths) + S, dtype=torch.int64, device=device) if found is None else found

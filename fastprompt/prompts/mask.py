# SPDX-License-Identifier: Apache-2.0
"""The attention mask of rows laid out as [prompt | tokens | filling]."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastprompt.ops._indices import indices


def prepend_mask(
    mask: Tensor | None, lengths: Sequence[int], num_tokens: int, device: torch.device
) -> Tensor | None:
    """The token mask with the prompts in front of it: 1 on prompt rows, the tokens' own values, 0 on filling.

    Args:
        mask: [B, S], 0 where a token is padding, on either side; None where every token counts.
        lengths: P_b of each of the B rows, or one number for all; a row with less than the longest has filling behind
            its tokens.
        num_tokens: S.
        device: of the result, where ``mask`` is None.

    Returns:
        [B, L] int64 with L = max P_b + S; None where nothing is hidden, so that HF takes its maskless path.
    """
    longest = max(lengths)
    ragged = min(lengths) < longest
    if mask is None and not ragged:
        return None
    shape = (len(lengths), num_tokens)
    tokens = torch.ones(shape, dtype=torch.int64, device=device) if mask is None else mask.ne(0).long()
    if not ragged:
        return torch.cat((tokens.new_ones(tokens.shape[0], longest), tokens), 1)
    start = indices(lengths, tokens.device)[:, None]
    position = torch.arange(longest + num_tokens, device=tokens.device)
    return (position < start).long().scatter(1, start + position[:num_tokens], tokens)

# SPDX-License-Identifier: Apache-2.0
"""The mask of [prompt | tokens | filling], against a loop over its rows."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastprompt.prompts.mask import prepend_mask


@settings(max_examples=50)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 6), st.booleans(), st.randoms())
def test_every_row_is_prompt_then_tokens_then_filling(lengths, num_tokens, masked, random):
    mask = torch.tensor([[random.randint(0, 1) for _ in range(num_tokens)] for _ in lengths])
    mask = mask.reshape(len(lengths), num_tokens).long() if masked else None
    result = prepend_mask(mask, lengths, num_tokens, torch.device("cpu"))
    expected = torch.zeros(len(lengths), max(lengths) + num_tokens, dtype=torch.int64)
    for row, length in enumerate(lengths):
        expected[row, :length] = 1
        expected[row, length : length + num_tokens] = 1 if mask is None else mask[row]
    if result is None:
        assert expected.all()
        assert not masked
    else:
        assert torch.equal(result, expected)
        assert masked or not expected.all(), "with nothing to hide, HF's maskless path is the faster one"

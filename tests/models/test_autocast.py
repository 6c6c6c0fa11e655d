# SPDX-License-Identifier: Apache-2.0
"""Autocast in the half precision that the model's weights do not have."""

import pytest
import torch

from fastprompt import PromptConfig, PromptModel, patch

HALVES = [(torch.float16, torch.bfloat16), (torch.bfloat16, torch.float16)]


@pytest.mark.parametrize(("own", "other"), HALVES)
@pytest.mark.parametrize("how", ["by name", "patched", "cached", "prefix"])
def test_the_other_half_precision(make, batch, labels, own, other, how, device):
    """As transformers' own layers compute it, within its rounding."""
    inputs = {**batch(), "labels": labels}
    expected = make(attention="eager").to(own)
    with torch.autocast(device.type, other):
        expected = expected(**inputs).loss.float()
    model = make(attention="fastprompt" if how == "by name" else "eager").to(own)
    if how == "patched":
        patch(model)
    if how in ("cached", "prefix"):  # the prompts' share is tested elsewhere: here, that it runs
        model = PromptModel(model, PromptConfig(2, kind=how))
    with torch.autocast(device.type, other):
        loss = model(**inputs).loss.float()
    if how in ("cached", "prefix"):
        loss.backward()
        assert all(each.grad.isfinite().all() for each in model.prompts.parameters())
    else:
        torch.testing.assert_close(loss, expected, rtol=0.02, atol=0.02)

# SPDX-License-Identifier: Apache-2.0
"""Packed execution in half precision: as exact as padded."""

import pytest
import torch
from packing import CONFIGS, LAYOUTS, ROWS, names, results

from fastprompt import patch
from fastprompt.model import PromptModel


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("memory", [None, "balanced"])
def test_half_precision_errs_as_padded(layout, memory, make_model, make_batch):
    """Root mean square errors of ten prompts: one alone has too few elements to tell two orders of rounding apart."""
    batch, errors = make_batch(B=8), {}
    for dtype, pack in ((torch.float64, False), (torch.bfloat16, False), (torch.bfloat16, None)):
        model = make_model(layout, dtype=torch.bfloat16, d_kv=16).to(dtype)
        prompted = PromptModel(model, CONFIGS["p5"], pack=pack)
        prompted = prompted if memory is None else patch(prompted, memory=memory)
        found = []
        for seed in range(10):
            prompt = prompted.prompts["default"]
            prompt.data = torch.randn(5, 32, generator=torch.Generator().manual_seed(seed)).to(prompt.device)
            prompt.data = prompt.data.bfloat16().float()
            found.append(results(prompted, batch, "default"))
        if dtype == torch.float64:
            truth = found
            continue
        for name in ("logits", "default"):
            pairs = [
                (ours[name].double(), true[name].double()) for ours, true in zip(found, truth, strict=True)
            ]
            squares = sum((ours - true).square().mean() / true.square().mean() for ours, true in pairs)
            errors.setdefault(name, []).append(float(squares) ** 0.5)
    for name, (padded, packed) in errors.items():
        assert 0 < packed <= 1.1 * padded, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory", [None, "balanced"])
def test_half_precision(dtype, memory, make_pair, make_batch):
    padded, packed, rows = make_pair(memory=memory)
    batch = make_batch()
    for prompts in ("p5", ("cached", "rows", "decoder")):
        expected = padded(**batch, prompts=names(prompts)).loss
        loss = packed.to(dtype)(**batch, prompts=names(prompts)).loss
        torch.testing.assert_close(loss.float(), expected, rtol=0.02, atol=0.02)
        assert rows[-1] == (ROWS[prompts], 1)

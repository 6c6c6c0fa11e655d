# SPDX-License-Identifier: Apache-2.0
"""A patched model in narrow dtypes is as exact as the stock one."""

import copy

import pytest
import torch
from layouts import as_close, no_further, step
from transformers import T5ForConditionalGeneration

from fastprompt import explain, patch

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("layout", ["t5", "v1_1", "mt5"])
def test_bfloat16_is_as_close_to_float64_as_the_stock_model(make, batch, labels, layout, use_cache):
    def steps(model):
        return [step(model, batch(S=S), labels, use_cache=use_cache) for S in range(14, 22)]

    model = make(layout, torch.bfloat16)
    truth, stock = steps(copy.deepcopy(model).double()), steps(model)
    as_close(steps(patch(model)), stock, truth)


def test_autocast_runs_the_stock_layers(make, batch, labels, layers_ran):
    model, batches = make(), [batch(S=S) for S in range(14, 22)]
    exact = copy.deepcopy(model).double()
    truth = [step(exact, inputs, labels) for inputs in batches]
    with torch.autocast(model.device.type, torch.bfloat16):
        stock = [step(model, inputs, labels) for inputs in batches]
        ours = [step(patch(model), inputs, labels) for inputs in batches]
    assert layers_ran == {"FrozenFF": 0, "FrozenAttention": 0}
    as_close(ours, stock, truth)


def test_half_precision_with_fp32_wo(make, batch, labels, tmp_path, layers_ran):
    """from_pretrained(dtype=float16) keeps wo in fp32, and the residual stream with it."""
    make().save_pretrained(tmp_path)
    inputs = batch()
    model = T5ForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float16).requires_grad_(False)
    model = model.to(labels.device)
    assert model.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype == torch.float32
    truth = step(copy.deepcopy(model).double(), inputs, labels)
    stock = step(model, inputs, labels)
    no_further(step(patch(model), inputs, labels), stock, truth)
    assert layers_ran == {"FrozenFF": 0, "FrozenAttention": 3}, "those in front of the first wo"
    assert any("float32" in (row.reason or "") for row in explain(model))

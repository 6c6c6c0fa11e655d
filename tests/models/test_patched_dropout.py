# SPDX-License-Identifier: Apache-2.0
"""Dropout in a patched model: torch's rates, each module's own, and one mask forward and backward."""

import pytest
import torch
from dropout_rates import kernels_rates, set_apart
from layouts import MEMORY, close, continued, step
from torch import nn

from fastprompt import patch

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("layout", ["t5", "v1_1"])
def test_dropout_is_the_same_under_every_policy(make, batch, labels, layout):
    model, results = make(layout, dropout_rate=0.3).train(), []
    for memory in MEMORY:
        torch.manual_seed(5)
        results.append(step(patch(model, memory=memory), batch(), labels))
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert torch.equal(one, two)
    torch.manual_seed(6)
    assert not torch.equal(step(model, batch(), labels)[0], results[0][0])
    plain = step(model.eval(), batch(), labels)
    assert not torch.equal(plain[0], results[0][0])


@pytest.mark.parametrize("layout", ["t5", "v1_1"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_dropout_gradient_is_that_of_the_function(make, batch, labels, layout, use_cache):
    """Finite differences in float64, with the masks of one seed and a rate of its own for each dropout."""
    model = make(layout, dtype=torch.float64, dropout_rate=0.2, num_layers=2, num_decoder_layers=1)
    model, inputs = patch(model.train(), memory="lean"), batch()
    for number, dropout in enumerate(m for m in model.modules() if isinstance(m, nn.Dropout)):
        dropout.p = (0.1, 0.3, 0.45)[number % 3]
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    direction = torch.randn(embeds.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))

    def loss(t):
        torch.manual_seed(7)
        point, mask = embeds + t * direction.to(embeds.device), inputs["attention_mask"]
        return model(inputs_embeds=point, attention_mask=mask, labels=labels, use_cache=use_cache).loss

    t = torch.zeros((), dtype=torch.float64, device=embeds.device, requires_grad=True)
    (slope,) = torch.autograd.grad(loss(t), t)
    h = 1e-6
    close(slope, ((loss(h) - loss(-h)) / (2 * h)).detach(), 1e-7)


@pytest.mark.parametrize("part", ["SelfAttention", "EncDecAttention", "dropout"])
def test_each_module_drops_by_its_own_mode(make, batch, part):
    """Of one attention layer: its weights' dropout, or its output's. Also in a step of generation."""
    model = patch(make(dropout_rate=0.5))
    layer = model.decoder.block[1].layer[part == "EncDecAttention"]
    embeds = torch.randn(3, 1, model.config.d_model, device=model.device)
    start = torch.zeros(3, 5, dtype=torch.int64, device=model.device)

    def results():
        torch.manual_seed(0)
        yield model(**batch(), decoder_input_ids=start, use_cache=False).logits
        yield continued(model, batch(), embeds)

    with torch.no_grad():
        plain = list(results())
        getattr(layer, part).training = True  # nothing below it
        assert not any(map(torch.equal, results(), plain))
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout) or type(module).__name__ == "T5Attention":
                module.training = False
        for found, expected in zip(results(), plain, strict=True):
            close(found, expected)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("layout", ["t5", "v1_1"])
def test_dropout_means_what_torch_means_by_it(make, batch, labels, monkeypatch, layout, use_cache):
    """The kernels drop with the rates that the stock model drops with, in the same order; each module has its own."""
    model, expected = set_apart(make(layout, dropout_rate=0.1)).train(), []

    def torchs(x, p=0.5, training=True, inplace=False):
        expected.append(p if training else 0.0)
        return dropout(x, p, training, inplace)

    dropout = nn.functional.dropout
    monkeypatch.setattr(nn.functional, "dropout", torchs)
    model(**batch(), labels=labels, use_cache=use_cache)
    assert len(expected) == 2 + len(set(expected)), "a stack's own dropout runs twice, all others once"
    stocks, rates = [*expected], kernels_rates(monkeypatch)
    patch(model)(**batch(), labels=labels, use_cache=use_cache)
    assert rates == stocks
    assert expected == stocks, "torch drops nothing more"

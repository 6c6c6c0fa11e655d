# SPDX-License-Identifier: Apache-2.0
"""The encoder's input gets a gradient in the prompts' rows only, and the prompts' gradient is the same."""

import pytest
import torch

import fastprompt.model
from fastprompt import patch
from fastprompt.ops.prompt_embed import prompt_embed


@pytest.fixture
def inputs(monkeypatch):
    """The encoder's inputs [B, L, D] of each forward; they keep their gradients."""
    found = []

    def kept(*args, **kwargs):
        embeds = prompt_embed(*args, **kwargs)
        embeds.retain_grad()
        found.append(embeds)
        return embeds

    monkeypatch.setattr(fastprompt.model, "prompt_embed", kept)
    return found


def gradients(prompted, batch, prompts):
    prompted.zero_grad()
    torch.manual_seed(0)
    prompted(**batch, prompts=prompts).loss.backward()
    return [each.grad.clone() for each in prompted.prompts.values()]


@pytest.mark.parametrize("memory", ["speed", "balanced", "lean", "minimal"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("hidden", ["encoder", "block", "layer", "dropout"])
def test_only_the_prompts_rows(memory, dropout, hidden, inputs, make_prompted, make_batch):
    prompted = make_prompted(lengths=(5, 2), d_kv=16, dropout_rate=dropout).train()
    patch(prompted, memory=memory)
    batch, prompts = make_batch("left"), ["p2", "p5", "p2"]
    found = gradients(prompted, batch, prompts)
    encoder = prompted.model.encoder
    block = encoder.block[0]
    module = {"encoder": encoder, "block": block, "layer": block.layer[0], "dropout": encoder.dropout}[hidden]
    module.register_forward_pre_hook(
        lambda module, args: None
    )  # which could look at the gradient of its input
    whole = gradients(prompted, batch, prompts)
    for ours, expected in zip(found, whole, strict=True):
        assert expected.norm() > 1e-3
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))
    some, every = (each.grad for each in inputs)
    assert some[:, :2].ne(0).any(-1).all()
    assert not some[:, 5:].any()
    assert every[:, 5:].any()
    torch.testing.assert_close(some[:, :5], every[:, :5], rtol=1e-6, atol=1e-6 * float(every.abs().max()))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant, make_prompted, make_batch):
    prompted = patch(make_prompted(lengths=(5, 2), d_kv=16, dropout_rate=0.0).train())
    batch, prompts = make_batch("left"), ["p2", "p5", "p2"]
    expected = gradients(prompted, batch, prompts)
    prompted.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    for ours, each in zip(gradients(prompted, batch, prompts), expected, strict=True):
        torch.testing.assert_close(ours, each, rtol=1e-5, atol=1e-5 * float(each.abs().max()))

# SPDX-License-Identifier: Apache-2.0
"""The encoder's input gets a gradient in the prompts' rows only, and the prompts' gradient is the same."""

import pytest
import torch

from fastprompt import patch
from fastprompt.ops.prompt_embed import prompt_embed
from fastprompt.prompts import row_batch


@pytest.fixture
def inputs(monkeypatch):
    """The encoder's inputs [B, L, D] of each forward; they keep their gradients."""
    found = []

    def kept(*args, **kwargs):
        embeds = prompt_embed(*args, **kwargs)
        embeds.retain_grad()
        found.append(embeds)
        return embeds

    monkeypatch.setattr(row_batch, "prompt_embed", kept)
    return found


def gradients(prompted, batch, prompts):
    prompted.zero_grad()
    torch.manual_seed(0)
    prompted(**batch, prompts=prompts).loss.backward()
    return [each.grad.clone() for each in prompted.prompts.values()]


@pytest.mark.parametrize("memory", ["speed", "balanced", "lean", "minimal"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("hooked", ["encoder", "block", "layer", "dropout"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_only_the_prompts_rows(memory, dropout, hooked, when, inputs, make_prompted, make_batch):
    prompted = make_prompted(lengths=(5, 2), d_kv=16, dropout_rate=dropout).train()
    patch(prompted, memory=memory)
    batch, prompts = make_batch("left"), ["p2", "p5", "p2"]
    found = gradients(prompted, batch, prompts)
    encoder = prompted.model.encoder
    block = encoder.block[0]
    module = {"encoder": encoder, "block": block, "layer": block.layer[0], "dropout": encoder.dropout}[hooked]
    hook = module.register_forward_pre_hook if when == "before" else module.register_forward_hook
    hook(lambda *args: None)  # which could look at the gradient of its input
    whole = gradients(prompted, batch, prompts)
    for ours, expected in zip(found, whole, strict=True):
        assert expected.norm() > 1e-3
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))
    some, every = (each.grad for each in inputs)
    assert some[:, :2].ne(0).any(-1).all()
    assert not some[:, 5:].any()
    assert every[:, 5:].any()
    torch.testing.assert_close(some[:, :5], every[:, :5], rtol=1e-6, atol=1e-6 * float(every.abs().max()))


@pytest.mark.parametrize("by", ["keyword", "config"])
def test_hidden_states_that_are_asked_for_have_their_gradient(by, make_prompted, make_batch):
    prompted, batch, found = make_prompted(lengths=(5,), d_kv=16), make_batch("left"), []
    if by == "config":
        prompted.model.encoder.config.output_hidden_states = True
    for _ in range(2):
        output = prompted(**batch, **({"output_hidden_states": True} if by == "keyword" else {}))
        first = output.encoder_hidden_states[0]
        found += torch.autograd.grad(output.loss, first)
        patch(prompted)
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5 * float(found[0].abs().max()))


@pytest.mark.parametrize("register", ["pre", "after"])
def test_hooks_on_all_modules(register, inputs, make_prompted, make_batch):
    prompted, batch = patch(make_prompted(lengths=(5,), d_kv=16)), make_batch("left")
    module = torch.nn.modules.module
    hook = {"pre": module.register_module_forward_pre_hook, "after": module.register_module_forward_hook}[
        register
    ]
    handle = hook(lambda *args: None)
    gradients(prompted, batch, "p5")
    handle.remove()
    gradients(prompted, batch, "p5")
    whole, some = (each.grad for each in inputs)
    assert whole[:, 5:].any()
    assert not some[:, 5:].any()


def test_what_transformers_leaves_in_a_model_is_no_reason(inputs, make_prompted, make_batch):
    prompted, batch = patch(make_prompted(lengths=(5,), d_kv=16)), make_batch("left")
    prompted(**batch, output_hidden_states=True, output_attentions=True)
    assert prompted.model.encoder.block[0]._forward_hooks
    inputs.clear()
    gradients(prompted, batch, "p5")
    assert not inputs[0].grad[:, 5:].any()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant, make_prompted, make_batch):
    prompted = patch(make_prompted(lengths=(5, 2), d_kv=16, dropout_rate=0.0).train())
    batch, prompts = make_batch("left"), ["p2", "p5", "p2"]
    expected = gradients(prompted, batch, prompts)
    prompted.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    for ours, each in zip(gradients(prompted, batch, prompts), expected, strict=True):
        torch.testing.assert_close(ours, each, rtol=1e-5, atol=1e-5 * float(each.abs().max()))


def test_what_is_added_in_place_has_its_gradient(monkeypatch, make_prompted, make_batch):
    prompted, batch = make_prompted(lengths=(5,), d_kv=16, dropout_rate=0.0), make_batch("left")
    patch(prompted)
    added = torch.zeros(1, 12, 32, device=prompted.device, requires_grad=True)
    mark = row_batch.mark_prompt_rows

    def marked(embeds, *arguments):
        mark(embeds, *arguments)
        embeds.add_(added)

    monkeypatch.setattr(row_batch, "mark_prompt_rows", marked)
    gradients(prompted, batch, "p5")
    assert added.grad[:, 5:].ne(0).any(-1).all()

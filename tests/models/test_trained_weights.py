# SPDX-License-Identifier: Apache-2.0
"""Weights that train: what depends on them stays in transformers' layers, which give them their gradient."""

import pytest
import torch
from layouts import TINY, close, each_memory, no_further, step
from torch.utils.checkpoint import checkpoint

import fastprompt
from fastprompt import explain, patch

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    "trained", ["SelfAttention.q", "EncDecAttention.v", "DenseReluDense.wo", "layer_norm"]
)
def test_trained_weights_get_their_gradient(make, batch, labels, trained):
    grads, patched = [], patch(make())
    for model in (patched, make(), make().double()):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained in name)
        step(model, batch(), labels)
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert grads[0]
    no_further(*grads)
    assert any("is trained" in (row.reason or "") for row in explain(patched))


def test_weights_that_could_train_take_no_kernel_from_an_evaluation(
    make, batch, labels, layers_ran, monkeypatch
):
    """from_pretrained leaves every weight to train; who generates has no need to freeze them."""
    norms, rms_norm = [], fastprompt.modules.norm.rms_norm
    monkeypatch.setattr(
        fastprompt.modules.norm, "rms_norm", lambda *given: norms.append(1) or rms_norm(*given)
    )
    model, inputs = make().requires_grad_(True).eval(), batch("right")
    generation = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    tokens, logits = model.generate(**inputs, **generation), model(**inputs, labels=labels).logits
    patch(model)
    assert torch.equal(model.generate(**inputs, **generation), tokens)
    assert layers_ran["FrozenFF"]
    assert layers_ran["FrozenAttention"]
    assert norms
    layers_ran.update(FrozenFF=0, FrozenAttention=0)
    with torch.no_grad():
        close(model(**inputs, labels=labels).logits, logits)
    assert all(layers_ran.values())
    layers_ran.update(FrozenFF=0, FrozenAttention=0)
    model(**inputs, labels=labels)
    with torch.no_grad():  # as the first run of a reentrant checkpoint does
        model.train()(**inputs, labels=labels)
    assert not any(layers_ran.values())


def test_what_is_exported_without_gradient_may_run_with_it(make, batch, labels):
    model, inputs = patch(make(frozen=False)), batch(None)
    more = {"labels": labels, "use_cache": False, "return_dict": False}
    expected = model(**inputs, **more)[0]
    with torch.no_grad():
        program = torch.export.export(model, (), inputs | more, strict=True).module()
    close(program(**inputs, **more)[0], expected)


def test_blocks_that_train_in_evaluation_mode_under_reentrant_checkpoints(make, device):
    """The bias goes from block to block: in the first run as in the second it is transformers'. Of the decoder's input
    nobody wants a gradient."""
    shape, grads = (2, 5, TINY["d_model"]), []
    x, states = torch.randn(shape, device=device), torch.randn(shape, device=device)
    for model in (make(frozen=False), patch(make(frozen=False))):
        for block in (*model.encoder.block, *model.decoder.block):

            def run(*args, forward=block.forward, **kwargs):
                return checkpoint(lambda *args: forward(*args, **kwargs), *args, use_reentrant=True)

            block.forward = run
        encoded = model.encoder(inputs_embeds=x.clone().requires_grad_()).last_hidden_state
        decoded = model.decoder(
            inputs_embeds=x, encoder_hidden_states=encoded + states.clone().requires_grad_(), use_cache=False
        )
        decoded.last_hidden_state.square().sum().backward()
        stacks = (model.encoder.block, model.decoder.block)
        grads.append([p.grad for stack in stacks for p in stack.parameters() if p.grad is not None])
    for ours, theirs in zip(*grads, strict=True):
        close(ours, theirs)


def test_trained_bias(make, batch, labels):
    models = make(), patch(make())
    for model in models:
        for stack in (model.encoder, model.decoder):
            stack.block[0].layer[0].SelfAttention.relative_attention_bias.requires_grad_(True)
        step(model, batch(), labels)
    for one, two in zip(*(model.parameters() for model in models), strict=True):
        if one.requires_grad:
            close(two.grad, one.grad)


@each_memory
def test_an_encoding_of_inference_mode_can_be_trained_on(make, batch, labels, memory):
    gradients = []
    for model in (make(), patch(make(), memory=memory)):
        with torch.inference_mode():
            encoded = model.encoder(**batch())
        embeds = model.shared(labels.clamp(min=0)).requires_grad_()
        model(encoder_outputs=encoded, decoder_inputs_embeds=embeds, labels=labels).loss.backward()
        gradients.append(embeds.grad)
    close(gradients[1], gradients[0])

# SPDX-License-Identifier: Apache-2.0
"""What a patched model keeps for the backward pass, by memory policy, and what it computes again."""

import pytest
import torch
from layouts import VOCAB, close, each_memory, step

from fastprompt import patch
from fastprompt.modules._attend import Attend
from fastprompt.modules._made import made_of
from fastprompt.ops.t5_attention import keeps_out
from fastprompt.testing import saved_bytes

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("memory", ["balanced", "lean", "minimal"])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_what_is_written_to_is_not_computed_again_as_it_was(make, batch, labels, memory, p):
    """The residual stream behind an attention layer, and the encoder's output."""

    def changed(model):
        def double(module, inputs, output):
            first = output[0] if isinstance(output, tuple) else output
            first.mul_(2.0)

        model.encoder.block[0].layer[0].register_forward_hook(double)
        model.encoder.register_forward_hook(lambda module, inputs, output: double(None, None, output[0]))
        torch.manual_seed(5)
        return step(model.train(p > 0.0), batch(), labels)

    expected = changed(patch(make(dropout_rate=p), memory="speed"))
    for ours, theirs in zip(changed(patch(make(dropout_rate=p), memory=memory)), expected, strict=True):
        close(ours, theirs)


@each_memory
def test_saved_bytes(make, batch, labels, memory):
    """Counted by hand for one encoder: per token the policy's tensors, and nothing of size S x S."""
    model = make(dropout_rate=0.1, num_decoder_layers=1).train().encoder
    D, I, F, H, layers, N = 48, 64, 40, 4, 3, 3 * 17  # noqa: E741 (I is T5's inner width)
    inputs = batch(None)
    embeds = model.embed_tokens(inputs["input_ids"]).detach().requires_grad_()
    with saved_bytes() as stock:
        model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"])
    with saved_bytes(exclude=(inputs["attention_mask"],)) as saved:
        patch(model, memory=memory)(inputs_embeds=embeds, attention_mask=inputs["attention_mask"])
    out = I if keeps_out(embeds) else 0  # which a CPU's kernel does without
    row = {"speed": 2 * D + 3 * I + out + 2 * F, "balanced": D + 4 * I, "lean": D + I, "minimal": D}[memory]
    attended = {"lean": 1, "minimal": 0}.get(memory, layers)  # blocks that keep what the attention computed
    blocks = attended * (row + 2 * H + 2) + (layers - attended) * (D + 2)
    floats = N * (blocks + D + 1)  # the final norm
    table, seeds, mask = H * (2 * 12 + 1) * 4, layers * 4 * 8 + 16, N
    assert 4 * floats <= saved.bytes <= 4 * floats + table + seeds + 8 * mask
    assert saved.bytes < stock.bytes


def test_balanced_is_lean_in_a_decoder(make, labels):
    sizes = []
    for memory in ("speed", "balanced", "lean"):
        decoder = patch(make(num_decoder_layers=1).decoder, memory=memory)
        embeds = decoder.embed_tokens(labels.clamp(min=0)).detach().requires_grad_()
        with saved_bytes(exclude=decoder.parameters()) as saved:
            decoder(inputs_embeds=embeds, use_cache=False)
        sizes.append(saved.bytes)
    assert sizes[0] > sizes[1] == sizes[2]


def test_minimal_computes_each_attention_again_once(make, batch, labels, monkeypatch):
    """Though the layers behind it in its block need it, too."""
    model, runs, run = patch(make(), memory="minimal"), [], Attend.run
    monkeypatch.setattr(Attend, "run", lambda *given: runs.append(1) or run(*given))
    model(**batch(), labels=labels)
    once = len(runs)
    runs.clear()
    step(model, batch(), labels)
    assert len(runs) == 2 * once - 1  # nobody differentiates what the decoder begins with


@each_memory
def test_the_encoders_output_is_made_again_but_for_speed(make, batch, labels, memory):
    model, saved = patch(make(dropout_rate=0.1).train(), memory=memory), set()
    embeds = model.shared(batch()["input_ids"]).detach().requires_grad_()

    def pack(tensor):
        saved.add(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(inputs_embeds=embeds, labels=labels, use_cache=False)
    assert (output.encoder_last_hidden_state.data_ptr() in saved) == (memory == "speed")


@pytest.mark.parametrize("grad", [False, True])
def test_an_encoding_that_nobody_differentiates_keeps_nothing_else(make, batch, grad):
    with torch.set_grad_enabled(grad):
        assert made_of(patch(make()).encoder(**batch()).last_hidden_state) is None


def test_saves_nothing_without_a_gradient(make, batch, labels):
    model = patch(make().train())
    with saved_bytes() as saved:
        model(**batch(), labels=labels)
    assert saved.bytes == 0


@pytest.mark.parametrize("T", [9, 12, 20])
@pytest.mark.parametrize("reentrant", [False, True])
@each_memory
def test_gradient_checkpointing(make, batch, memory, reentrant, T):
    """Of few queries cross-attention makes no keys, and where gradients are wanted, fewer are few."""
    model = patch(make(dropout_rate=0.2, d_kv=16).train(), memory=memory)
    labels = torch.randint(2, VOCAB, (3, T), generator=torch.Generator().manual_seed(2)).to(model.device)
    torch.manual_seed(3)
    expected = step(model, batch(), labels, use_cache=False)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.manual_seed(3)
    for ours, theirs in zip(step(model, batch(), labels, use_cache=False), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_gradients_that_others_hold_are_not_written_to(make, batch, labels):
    """What a hook on a layer's output was given is still the gradient when the backward pass is over."""

    def gradients(model):
        embeds, found = model.shared(batch()["input_ids"]).detach().requires_grad_(), []
        mask = batch()["attention_mask"]
        output = model.encoder(inputs_embeds=embeds, attention_mask=mask, output_hidden_states=True)
        for hidden in output.hidden_states:
            hidden.register_hook(found.append)
        output.last_hidden_state.square().sum().backward()
        return found

    expected = gradients(make())
    for ours, theirs in zip(gradients(patch(make())), expected, strict=True):
        close(ours, theirs)

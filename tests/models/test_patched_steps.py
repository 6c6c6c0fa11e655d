# SPDX-License-Identifier: Apache-2.0
"""A patched model gives the stock one's outputs and gradients, whatever it is called with."""

import pytest
import torch
from layouts import LAYOUTS, TINY, VOCAB, close, each_memory, step
from transformers import (
    Pop2PianoConfig,
    Pop2PianoForConditionalGeneration,
    T5EncoderModel,
    UdopConfig,
    UdopForConditionalGeneration,
)

from fastprompt import PromptConfig, PromptModel, explain, hf_attention, patch
from fastprompt._cache_name import CACHE

pytestmark = pytest.mark.usefixtures("one_thread")


@each_memory
@pytest.mark.parametrize("padding", [None, "right", "left"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_forward_and_gradient(make, batch, labels, layout, padding, memory):
    model, inputs = make(layout), batch(padding)
    expected = step(model, inputs, labels)
    for ours, theirs in zip(step(patch(model, memory=memory), inputs, labels), expected, strict=True):
        close(ours, theirs)


@each_memory
@pytest.mark.parametrize("padding", [None, "left", "everywhere"])
@pytest.mark.parametrize("layout", ["t5", "v1_1"])
def test_few_targets_without_a_cache(make, batch, labels, layout, padding, memory):
    """As in training: cross-attention then computes no keys. One example may have no token at all."""
    model, inputs = make(layout), batch(padding and "left")
    if padding == "everywhere":
        inputs["attention_mask"][1] = 0
    expected = step(model, inputs, labels, use_cache=False)
    ours = step(patch(model, memory=memory), inputs, labels, use_cache=False)
    for one, two in zip(ours, expected, strict=True):
        close(one, two)


@each_memory
def test_each_norm_has_its_own_epsilon(make, batch, labels, memory):
    def changed():
        model = make()
        for number, norm in enumerate(m for m in model.modules() if "LayerNorm" in type(m).__name__):
            norm.variance_epsilon = 0.1 * number
        return model

    expected = step(changed(), batch(), labels, use_cache=False)
    ours = step(patch(changed(), memory=memory), batch(), labels, use_cache=False)
    for one, two in zip(ours, expected, strict=True):
        close(one, two)


@pytest.mark.parametrize("proj", ["gated-relu", "gelu", "silu"])
def test_activations_that_no_kernel_has(make, batch, labels, proj):
    expected = step(make(feed_forward_proj=proj), batch(), labels)
    model = patch(make(feed_forward_proj=proj))
    for ours, theirs in zip(step(model, batch(), labels), expected, strict=True):
        close(ours, theirs)
    part = "gate" if proj == "gated-relu" else "activation"
    assert any(f"its {part} is a " in (row.reason or "") for row in explain(model))


@pytest.mark.parametrize(("buckets", "distance"), [(8, 2), (8, 1), (32, 8), (4, 1), (2, 8), (1, 8)])
def test_buckets_that_make_no_table_fall_back(make, batch, labels, device, buckets, distance):
    if device.type == "cuda":
        pytest.skip("transformers' IndexError is a device-side assert there, which ends the process")
    changes = {"relative_attention_num_buckets": buckets, "relative_attention_max_distance": distance}
    try:
        expected = step(make(**changes), batch(), labels)
    except (IndexError, ZeroDivisionError, ValueError) as error:  # transformers has no result either
        with pytest.raises(type(error)):
            step(patch(make(**changes)), batch(), labels)
        return
    model = patch(make(**changes))
    for ours, theirs in zip(step(model, batch(), labels), expected, strict=True):
        close(ours, theirs)
    reasons = {row.reason for row in explain(model) if row.cls == "T5LayerSelfAttention"}
    assert any("max_distance" in (reason or "") for reason in reasons)


@each_memory
def test_one_encoding_for_several_targets(make, batch, labels, memory):
    one = {name: x[:1] for name, x in batch().items()}
    found = []
    for model in (make(), patch(make(), memory=memory)):
        encoded = model.encoder(**one)
        found.append(model(encoder_outputs=encoded, labels=labels, use_cache=False).logits)
    close(found[1], found[0])


def test_hidden_states_and_attentions(make, batch, labels):
    model, options = make(), {"output_hidden_states": True, "output_attentions": True}
    expected = model(**batch(), labels=labels, **options)
    ours = patch(model)(**batch(), labels=labels, **options)
    assert list(ours) == list(expected)
    for name in expected:
        if isinstance(expected[name], tuple) and name != CACHE:
            assert len(ours[name]) == len(expected[name])
            for one, two in zip(ours[name], expected[name], strict=True):
                close(one, two)


def test_attentions_that_the_configuration_asks_for(make, batch, labels):
    outputs = []
    for change in (lambda model: model, patch):
        model = change(make())
        for part in (model, model.encoder, model.decoder):
            part.config.output_attentions = True
        outputs.append(model(**batch(), labels=labels))
    for name in ("encoder_attentions", "decoder_attentions", "cross_attentions"):
        assert outputs[0][name]
        for theirs, ours in zip(*(output[name] for output in outputs), strict=True):
            close(ours, theirs)


def test_four_dimensional_mask(make, batch, labels):
    model, inputs = make(), batch()
    mask = (1.0 - inputs["attention_mask"][:, None, None, :].float()) * torch.finfo(torch.float32).min
    inputs["attention_mask"] = mask
    expected = step(model, inputs, labels)
    for ours, theirs in zip(step(patch(model), inputs, labels), expected, strict=True):
        close(ours, theirs)


@pytest.mark.parametrize("offset", [3, 0])
def test_positions_that_no_cache_explains(make, device, offset):
    """The mask says where the queries stand; a layer that holds fewer keys than stand before them is not ours."""
    model = make(attention="fastprompt")
    layer, x = model.decoder.block[0].layer[0], torch.randn(2, 5, 48, device=device)
    allowed = hf_attention.Allowed(None, offset, causal=True)
    expected = layer(x, allowed)[0]
    patch(model)
    close(layer(x, allowed)[0], expected)


def test_a_model_without_memory_says_what_shapes_come_out(make):
    """As when a model is planned before it is loaded."""
    model, ids = patch(make()).to("meta"), torch.zeros(2, 7, dtype=torch.int64, device="meta")
    with torch.no_grad():
        assert model.encoder(ids).last_hidden_state.shape == (2, 7, model.config.d_model)


def test_encoder_alone(make, batch, device, layers_ran):
    model = T5EncoderModel(make().config).to(device).eval().requires_grad_(False)
    expected = model(**batch())[0]
    close(patch(model)(**batch())[0], expected)
    assert layers_ran == {"FrozenFF": 3, "FrozenAttention": 3}


def test_prompt_model(make, batch, labels):
    results = []
    for change in (lambda model: model, patch):
        torch.manual_seed(0)
        model = change(PromptModel(make(), PromptConfig(num_tokens=4)))
        output = model(**batch(), labels=labels)
        output.loss.backward()
        results.append((output.logits.detach(), model.prompts["default"].grad))
    for ours, theirs in zip(*reversed(results), strict=True):
        close(ours, theirs)


def udop():
    sizes = ("vocab_size", "d_model", "d_ff", "num_layers", "num_heads", "d_kv")
    config = UdopConfig(**{name: TINY[name] for name in sizes})
    ids = torch.randint(2, VOCAB, (2, 9))
    inputs = {"input_ids": ids, "bbox": torch.rand(2, 9, 4), "decoder_input_ids": ids[:, :5]}
    return UdopForConditionalGeneration(config), inputs


def pop2piano():
    config = Pop2PianoConfig(**TINY, composer_vocab_size=3)
    inputs = {"inputs_embeds": torch.randn(2, 9, 48), "decoder_input_ids": torch.randint(2, VOCAB, (2, 5))}
    return Pop2PianoForConditionalGeneration(config), inputs


@each_memory
@pytest.mark.parametrize("relative", [udop, pop2piano])
def test_relatives_of_t5(relative, memory):
    torch.manual_seed(0)
    model, inputs = relative()
    model.eval().requires_grad_(False)
    expected = model(**inputs).logits
    patch(model, memory=memory, lm_loss=True)
    rows = explain(model)
    close(model(**inputs).logits, expected)
    assert {row.cls for row in rows if row.reason is None and row.cls.endswith(("LayerNorm", "LayerFF"))}
    assert {row.reason for row in rows if row.cls.endswith("Attention")} == {
        "it computes something else than T5's"
    }

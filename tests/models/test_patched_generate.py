# SPDX-License-Identifier: Apache-2.0
"""A patched model generates what the stock one does, and fills and reads caches as it does."""

import pytest
import torch
from layouts import close, continued
from transformers import DynamicCache, EncoderDecoderCache, StaticCache
from transformers.models.t5.modeling_t5 import T5Attention

from fastprompt import _bias_by_distance, patch
from fastprompt._cache_name import CACHE, cache_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"do_sample": True, "top_k": 5},
        {"use_cache": False},
        {"cache_implementation": "static"},
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", ["t5", "v1_1", "mt5"])
def test_generate(make, batch, layout, options):
    model = make(layout)
    outputs = []
    for run in (model, patch(model)):
        torch.manual_seed(0)
        outputs.append(run.generate(**batch("left"), max_new_tokens=12, min_new_tokens=12, **options))
    assert torch.equal(*outputs)


def test_generate_from_a_padded_start_over_a_static_cache(make, batch, labels):
    """transformers makes the decoder's mask as long as the cache, also for the first call."""
    start = labels[:, :3].clamp(min=2)
    mask = torch.ones_like(start)
    mask[1, :2] = 0
    options = {"decoder_input_ids": start, "decoder_attention_mask": mask, "cache_implementation": "static"}
    outputs = [
        run.generate(**batch(), **options, max_new_tokens=5, min_new_tokens=5)
        for run in (make(), patch(make(attention="fastprompt")))
    ]
    assert torch.equal(*outputs)


@pytest.mark.parametrize("masked", [False, True])
def test_a_static_cache_that_is_longer_than_the_input(make, batch, masked):
    """Its free slots in cross-attention are attended to, where no mask hides them: zeros, as in transformers."""
    inputs, start, logits = batch(), torch.ones(3, 1, dtype=torch.int64), []
    if not masked:
        inputs.pop("attention_mask")
    for model in (make("t5"), patch(make("t5"))):
        caches = (
            StaticCache(config=model.decoder.config, max_cache_len=length)
            for length in (12, 17 if masked else 30)
        )
        past, found = EncoderDecoderCache(*caches), []
        with torch.no_grad():
            encoded = model.encoder(**inputs)
            for token in (start, 2 * start, 3 * start):
                output = model(
                    encoder_outputs=encoded,
                    attention_mask=inputs.get("attention_mask"),
                    decoder_input_ids=token.to(model.device),
                    **{CACHE: past},
                )
                found.append(output.logits)
        logits.append(torch.cat(found))
    close(*logits)


def test_a_dense_bias_becomes_a_table_once(make, batch, monkeypatch):
    """One that a stock layer computed, for all layers behind it."""
    model, tables, make_table = patch(make()), [], _bias_by_distance._table
    model.encoder.block[0].layer[0].SelfAttention.q.register_forward_hook(lambda *_: None)
    monkeypatch.setattr(_bias_by_distance, "_table", lambda *args: tables.append(1) or make_table(*args))
    model.encoder(**batch())
    assert len(tables) == 1


def test_a_step_of_generation_calls_no_stock_attention(make, batch, monkeypatch):
    model, options = make(), {"max_new_tokens": 6, "min_new_tokens": 6}
    logits = {"output_logits": True, "return_dict_in_generate": True}
    expected = model.generate(**batch(), **options, **logits).logits
    monkeypatch.setattr(T5Attention, "forward", lambda *_args, **_kwargs: pytest.fail("stock attention"))
    for ours, theirs in zip(
        patch(model).generate(**batch(), **options, **logits).logits, expected, strict=True
    ):
        close(ours, theirs)


def test_a_step_of_generation_has_gradients_and_dropout(make, batch):
    model, gradients = make(), []
    embeds = torch.randn(3, 1, model.config.d_model, device=model.device, requires_grad=True)
    for run in (model, patch(model)):
        gradients += torch.autograd.grad(continued(run, batch(), embeds).square().sum(), embeds)
    close(*reversed(gradients))
    with torch.no_grad():
        one = continued(model.train(), batch(), embeds)
        assert not torch.equal(one, continued(model, batch(), embeds))
        expected = continued(model.eval(), batch(), embeds)
        for module in model.decoder.modules():  # a layer's own dropout alone
            module.train("Dropout" in type(module).__name__)
        assert not torch.equal(continued(model, batch(), embeds), expected)


def test_a_cache_that_was_emptied_is_filled_again(make, batch, labels):
    """EncoderDecoderCache.reset leaves keys of zeros, and says that they are not up to date."""
    found = []
    for model in (make(), patch(make())):
        past = EncoderDecoderCache(DynamicCache(), DynamicCache())
        with torch.no_grad():
            encoded = model.encoder(**batch())
            for _ in range(2):
                past.reset()
                output = model(encoder_outputs=encoded, labels=labels, **{CACHE: past})
        found.append(output)
    close(found[1].logits, found[0].logits)
    assert cache_of(found[1]).is_updated == cache_of(found[0]).is_updated


def test_a_cache_without_a_part_for_cross_attention(make, batch, labels):
    """It is transformers' to read and to fill."""
    found = []
    for model in (make(), patch(make())):
        with torch.no_grad():
            encoded = model.encoder(**batch())
            found.append(model(encoder_outputs=encoded, labels=labels, **{CACHE: DynamicCache()}).logits)
    close(found[1], found[0])


def test_training_fills_the_cache_as_before(make, batch, labels):
    model = make()
    expected = cache_of(model(**batch(), labels=labels))
    embeds = model.shared(batch()["input_ids"]).detach().requires_grad_()
    inputs = {"inputs_embeds": embeds, "attention_mask": batch()["attention_mask"]}
    ours = cache_of(patch(model)(**inputs, labels=labels))
    for name in ("self_attention_cache", "cross_attention_cache"):
        pairs = zip(getattr(ours, name).layers, getattr(expected, name).layers, strict=True)
        for one, two in pairs:
            close(one.keys, two.keys)
            close(one.values, two.values)
    assert ours.is_updated == expected.is_updated

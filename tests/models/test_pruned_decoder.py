# SPDX-License-Identifier: Apache-2.0
"""Decoders that have lost blocks: each keeps its place in a cache, whose first layers may then stay empty."""

import copy

import pytest
import torch
from torch import nn

from fastprompt import graphed, patch
from fastprompt._cache_name import CACHE, cache_of

GENERATION = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
BLOCKS = [(0, 2), (1, 2), (2,), (2, 1)]


@pytest.fixture
def pruned(make):
    def pruned(layout, blocks, attention="eager"):
        model = make(layout, attention=attention, num_layers=3, num_decoder_layers=3)
        model.decoder.block = nn.ModuleList(model.decoder.block[i] for i in blocks)
        return model

    return pruned


@pytest.mark.parametrize("layout", ["v1_1", "umt5"])
@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
@pytest.mark.parametrize("way", ["patched", "by name"])
def test_cached_steps_are_those_of_the_whole_sequence(pruned, batch, layout, blocks, way):
    model, inputs = pruned(layout, blocks), batch()
    tokens = torch.randint(2, 60, (3, 6), device=inputs["input_ids"].device)
    with torch.no_grad():
        whole = model(**inputs, decoder_input_ids=tokens, use_cache=False).logits
        served = patch(model) if way == "patched" else pruned(layout, blocks, "fastprompt")
        past, logits = None, []
        for token in tokens.split(1, 1):
            output = served(**inputs, decoder_input_ids=token, **{CACHE: past}, use_cache=True)
            past, logits = cache_of(output), [*logits, output.logits]
    torch.testing.assert_close(torch.cat(logits, 1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", ["v1_1", "umt5"])
@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
def test_generates_as_stock_does(pruned, batch, layout, blocks):
    model, inputs = pruned(layout, blocks), batch()
    expected = model.generate(**inputs, use_cache=False, **GENERATION)
    patch(model)
    assert torch.equal(model.generate(**inputs, **GENERATION), expected)
    assert torch.equal(graphed(model).generate(**inputs, **GENERATION), expected)


@pytest.mark.parametrize("way", ["patched", "by name"])
def test_several_tokens_over_an_empty_first_layer_are_refused(pruned, batch, way):
    """transformers refuses them, too, by the shapes of mask and scores."""
    model, inputs = pruned("umt5", (1, 2), "eager" if way == "patched" else "fastprompt"), batch()
    tokens = torch.randint(2, 60, (3, 4), device=inputs["input_ids"].device)
    if way == "patched":
        patch(model)
    with torch.no_grad():
        past = cache_of(model(**inputs, decoder_input_ids=tokens, use_cache=True))
        with pytest.raises(ValueError, match="holds 4 keys for this layer and 0 for the first"):
            model(**inputs, decoder_input_ids=tokens[:, :2], **{CACHE: past})


@pytest.mark.parametrize("site", ["encoder", "decoder"])
def test_blocks_that_change_places_after_patching(make, batch, labels, site):
    """A first block without a bias hands on zeros, and the one that has it does not use it."""
    model, inputs = make(), batch()
    patched = patch(copy.deepcopy(model))
    for each in (model, patched):
        stack = getattr(each, site)
        stack.block = nn.ModuleList(reversed(stack.block))
    with torch.no_grad():
        found, expected = (each(**inputs, labels=labels).logits for each in (patched, model))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

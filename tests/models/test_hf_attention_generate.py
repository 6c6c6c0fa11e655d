# SPDX-License-Identifier: Apache-2.0
"""attn_implementation="fastprompt" generates what "eager" does, by t5_attention, over caches of every kind."""

import copy
from itertools import pairwise

import pytest
import torch
from generation import generates_the_same
from layouts import VOCAB, close

from fastprompt import hf_attention, patched
from fastprompt._cache_name import CACHE

pytestmark = pytest.mark.usefixtures("one_thread")

GENERATE = {
    "greedy": {},
    "beam": {"num_beams": 3},
    "sampling": {"do_sample": True, "top_p": 0.9},
    "static": {"cache_implementation": "static"},
    "static_beam": {"cache_implementation": "static", "num_beams": 3},
    "no_cache": {"use_cache": False},
    "no_cache_beam": {"use_cache": False, "num_beams": 2},
    "decoder_prompt": {"decoder_input_ids": torch.tensor([[0, 9, 11, 4]] * 3)},
    "static_decoder_prompt": {
        "decoder_input_ids": torch.tensor([[0, 9, 11, 4]] * 3),
        "cache_implementation": "static",
    },
    "padded_decoder_prompt": {
        "decoder_input_ids": torch.tensor([[0, 0, 0, 4], [0, 0, 9, 8], [0, 5, 6, 7]]),
        "decoder_attention_mask": torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1]]),
    },
}
GENERATE["static_padded_decoder_prompt"] = GENERATE["padded_decoder_prompt"] | {
    "cache_implementation": "static"
}


@pytest.mark.parametrize("mode", GENERATE)
@pytest.mark.parametrize("padding", ["right", "left"])
def test_generate(mode, padding, pair, batch, ran):
    generates_the_same(*pair(), batch(padding), **GENERATE[mode])
    assert len(ran) == 3 + 16 * 4


@pytest.mark.parametrize("layout", ["t5", "mt5", "umt5"])
@pytest.mark.parametrize("mode", ["beam", "static"])
def test_generate_layouts(layout, mode, pair, batch, ran):
    generates_the_same(*pair(layout), batch(), **GENERATE[mode])
    assert len(ran) == 2 + 16 * 4


def test_prefill_in_chunks(pair, batch, ran):
    """transformers gives cross-attention a mask of fewer columns than keys there, and so gets its own functions."""
    eager, ours = pair()
    with patched(copy.deepcopy(eager)) as fused:
        generated = [
            model.generate(**batch("right"), prefill_chunk_size=2, max_new_tokens=4, do_sample=False)
            for model in (eager, ours, fused)
        ]
    assert all(torch.equal(each, generated[0]) for each in generated)
    assert len(ran) == 3 + 2 + 3 * 4


def test_prefill_in_chunks_of_several_tokens(pair, batch, device, ran):
    """Of such masks, transformers' functions take those that hide nothing."""
    ids = batch("none")["input_ids"]
    start = torch.tensor([[0, 5, 6, 7]] * len(ids), device=device)
    how = {"decoder_input_ids": start, "prefill_chunk_size": 2, "max_new_tokens": 3, "do_sample": False}
    eager, ours = (model.generate(ids, attention_mask=torch.ones_like(ids), **how) for model in pair())
    assert torch.equal(ours, eager)
    assert len(ran) == 3 + 2 * 2 + 2 * 4


def test_prompt_lookup(pair, batch, ran):
    """Several new queries at once behind a cache."""
    inputs = batch(B=1) | {"prompt_lookup_num_tokens": 3, "max_new_tokens": 16}
    eager, ours = (model.generate(**inputs) for model in pair("t5"))
    assert torch.equal(ours, eager)
    offsets = [call["offset"] for call in ran if call["causal"]][::2]
    assert max(after - before for before, after in pairwise(offsets)) > 1
    assert len(ran) == 2 + 4 * len(offsets)


def test_several_queries_behind_a_static_cache(pair, batch, device, ran):
    from transformers import DynamicCache, EncoderDecoderCache, StaticCache

    eager, ours = pair()
    ids = torch.randint(2, VOCAB, (3, 13), generator=torch.Generator().manual_seed(3)).to(device)
    whole = eager(**batch(), decoder_input_ids=ids).logits
    encoded = ours.get_encoder()(**batch())
    static = StaticCache(config=ours.config, max_cache_len=20)
    for cache in (static, DynamicCache(config=ours.decoder.config)):
        cache = EncoderDecoderCache(cache, DynamicCache(config=ours.decoder.config))
        parts = [
            ours(
                encoder_outputs=encoded,
                attention_mask=batch()["attention_mask"],
                decoder_input_ids=part,
                use_cache=True,
                **{CACHE: cache},
            ).logits
            for part in ids.split((5, 1, 4, 3), 1)
        ]
        close(torch.cat(parts, 1), whole)
    assert len(ran) == 3 + 2 * 4 * 4


def test_keys_that_a_caller_passes_stand_where_the_cache_ends(pair, batch, device, ran):
    """They say who is padding; where the next queries are, only the cache knows."""
    from transformers import DynamicCache, EncoderDecoderCache

    _, ours = pair()
    ids = torch.randint(2, VOCAB, (3, 8), generator=torch.Generator().manual_seed(3)).to(device)
    whole = ours(**batch(), decoder_input_ids=ids).logits
    cache = EncoderDecoderCache(
        DynamicCache(config=ours.decoder.config), DynamicCache(config=ours.decoder.config)
    )
    options = {"encoder_outputs": ours.get_encoder()(**batch()), CACHE: cache, "use_cache": True}
    options |= {"attention_mask": batch()["attention_mask"]}
    options |= {"decoder_attention_mask": hf_attention.Allowed(None, 0, causal=True)}
    parts = [ours(decoder_input_ids=part, **options).logits for part in ids.split((5, 3), 1)]
    close(torch.cat(parts, 1), whole)
    assert [call["offset"] for call in ran if call["causal"]] == [0] * 4 + [5] * 2

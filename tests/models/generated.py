# SPDX-License-Identifier: Apache-2.0
"""What tests of graphed(model).generate share: kinds of search, and the model's own answers."""

import torch

from fastprompt._cache_name import cache_of

SCORES = {"return_dict_in_generate": True, "output_scores": True}
SHORT = {"max_new_tokens": 6, "min_new_tokens": 6}
MODES = [
    {},
    {"num_beams": 3},
    {"num_beams": 2, "num_return_sequences": 2},
    {"do_sample": True, "num_return_sequences": 2},
    {"repetition_penalty": 1.3},
]


def assert_the_same(step, *args, replays=True, **kwargs):
    """Sequences, scores and what the cache holds, which is of the decoder's layers alone if the step replays."""
    found = []
    for model in (step.model, step):
        torch.manual_seed(7)
        found.append(model.generate(*args, **(SHORT | SCORES | kwargs)))
    theirs, ours = found
    assert torch.equal(ours.sequences, theirs.sequences)
    for our, their in zip(ours.scores, theirs.scores, strict=True):
        torch.testing.assert_close(our, their, rtol=2e-5, atol=2e-5)
    for name in ("self_attention_cache", "cross_attention_cache"):
        our_layers, their_layers = (getattr(cache_of(each), name).layers for each in (ours, theirs))
        assert not replays or len(our_layers) == step.model.config.num_decoder_layers
        for our, their in zip(our_layers, their_layers, strict=False):  # theirs may have the encoder's number
            torch.testing.assert_close(our.keys, their.keys, rtol=2e-5, atol=2e-5)
            torch.testing.assert_close(our.values, their.values, rtol=2e-5, atol=2e-5)
    return ours

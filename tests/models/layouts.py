# SPDX-License-Identifier: Apache-2.0
"""The models that these tests use, and what they compare."""

import pytest
import torch
from transformers import (
    LongT5Config,
    LongT5ForConditionalGeneration,
    MT5Config,
    MT5ForConditionalGeneration,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    UMT5Config,
    UMT5ForConditionalGeneration,
)

from fastprompt._cache_name import CACHE, cache_of

VOCAB = 64
TINY = {
    "vocab_size": VOCAB,
    "d_model": 48,  # not heads * d_kv
    "d_ff": 40,
    "num_layers": 2,
    "num_heads": 4,
    "d_kv": 16,
    "relative_attention_num_buckets": 8,  # so that short inputs reach every bucket
    "relative_attention_max_distance": 12,
    "decoder_start_token_id": 0,
}
LAYOUTS = {
    "t5": (T5ForConditionalGeneration, T5Config, {"feed_forward_proj": "relu"}),
    "v1_1": (
        T5ForConditionalGeneration,
        T5Config,
        {"feed_forward_proj": "gated-gelu", "num_layers": 3, "num_decoder_layers": 2},
    ),
    "ul2": (T5ForConditionalGeneration, T5Config, {"feed_forward_proj": "gated-silu"}),
    "mt5": (MT5ForConditionalGeneration, MT5Config, {}),
    "umt5": (UMT5ForConditionalGeneration, UMT5Config, {}),
    "longt5": (LongT5ForConditionalGeneration, LongT5Config, {"encoder_attention_type": "local"}),
    "switch": (SwitchTransformersForConditionalGeneration, SwitchTransformersConfig, {"num_experts": 2}),
}
FULL = ("t5", "v1_1", "ul2", "mt5")  # every layer is served
LAYERS = {"t5": 6, "v1_1": 7, "mt5": 6, "umt5": 6}  # attention layers: encoder, and two per decoder block
MEMORY = ("speed", "balanced", "lean", "minimal")

each_memory = pytest.mark.parametrize("memory", MEMORY)


def classes(model):
    return [type(module) for module in model.modules()]


def step(model, batch, labels, **options):
    """(logits, loss, gradient of inputs_embeds)."""
    embeds = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    output = model(inputs_embeds=embeds, attention_mask=batch["attention_mask"], labels=labels, **options)
    output.loss.backward()
    return output.logits.detach(), output.loss.detach(), embeds.grad


def continued(model, inputs, embeds):
    """Logits of one more token behind two that a cache holds."""
    start = torch.zeros(3, 2, dtype=torch.int64, device=embeds.device)
    past = cache_of(model(**inputs, decoder_input_ids=start, use_cache=True))
    return model(**inputs, decoder_inputs_embeds=embeds, **{CACHE: past}).logits


def close(ours, theirs, tolerance=1e-5):
    scale = max(1.0, theirs.detach().abs().max().item())
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * scale)


def no_further(ours, stock, truth):
    """Largest errors of all results together, where small roundings grow: no model of this size has gradients to its
    dtype's last digits, and which result suffers most is luck.
    """

    def largest(results):
        return max(
            float((x.double() - exact).abs().max() / exact.abs().max().clamp(min=1.0))
            for x, exact in zip(results, truth, strict=True)
        )

    assert largest(ours) <= 2 * largest(stock) + 1e-5


def as_close(ours, stock, truth):
    """Root mean square of the errors of several steps, as each is (logits, loss, gradient): one loss alone is luck, and
    of n numbers the quotient of two such means still spreads by 1 / sqrt(n), of which three are allowed.
    """
    pooled = (
        [torch.cat([x.flatten() for x in each]) for each in zip(*steps, strict=True)]
        for steps in (ours, stock, truth)
    )
    for mine, theirs, exact in zip(*pooled, strict=True):
        error, allowed = ((x.double() - exact).pow(2).mean().sqrt() for x in (mine, theirs))
        assert error <= (1.1 + 3 * len(exact) ** -0.5) * allowed + 2**-9 * exact.abs().mean()

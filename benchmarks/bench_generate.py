# SPDX-License-Identifier: Apache-2.0
"""Generating with a whole patched T5 beside the stock one: 16 tokens, greedy or by beams, of inputs of 64.

Random weights in the shapes of v1.1-small and v1.1-base, in fp32, on a CPU that multiplies bf16 in that, too; on a GPU
in bf16 alone. Also by graphs (fastprompt.graphed), on a GPU of the stock model as well; with a static cache, compiled;
and by CTranslate2 where that is installed. Of the time, at most the encoder's pass over B S rows is not spent on steps
of B rows, or B beams, which read every weight of the decoder once.
"""

from functools import partial
from typing import Any

import _ctranslate2
import torch
from _harness import OURS, Case, Contender, Options, Spec, assert_near, main, multiplies_bf16
from bench_training_step import EAGER, GRAPHED, MODELS, SDPA
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

from fastprompt import graphed, patch
from fastprompt.testing import share

NEW_TOKENS = 16
STATIC = "HF sdpa, static cache, compiled"


def specs(options: Options) -> list[Spec]:
    def spec(model: str, dtype: torch.dtype, B: int, S: int, beams: int) -> Spec:
        sizes = (("B", B), ("S", S), ("beams", beams))
        return Spec(model, dtype, sizes, model != "v1.1-small" and (B, beams) in ((1, 1), (2, 1)))

    if options.quick:
        return [spec("tiny", torch.float32, 2, 12, beams) for beams in (1, 2)]
    dtypes = [torch.bfloat16] if options.device == "cuda" else [torch.float32]
    if multiplies_bf16(options):
        dtypes.append(torch.bfloat16)
    return [
        spec(model, dtype, B, 64, beams)
        for model in ("v1.1-small", "v1.1-base")
        for dtype in dtypes
        for B, beams in ((1, 1), (4, 1), (8, 1), (1, 4))
    ]


def contenders(spec: Spec, options: Options) -> list[str]:
    on_gpu = options.device == "cuda"
    recorded = [name for name, kind in GRAPHED.items() if on_gpu or kind == OURS]
    sizes = dict(spec.sizes)
    # Compiled for a minute
    compiled = spec.what == "v1.1-base" and sizes["beams"] == 1 and sizes["B"] in ((8,) if on_gpu else (1, 8))
    static = [STATIC] if compiled else []
    return [OURS, EAGER, SDPA, *recorded, *static, *_ctranslate2.contenders(spec.dtype, options.device)]


def build(spec: Spec, options: Options) -> Case:
    B, S, beams = (size for _, size in spec.sizes)
    config = T5Config(
        **MODELS[spec.what],
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
        eos_token_id=1,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    with torch.device(options.device):
        stock = T5ForConditionalGeneration._from_config(config, attn_implementation="eager", dtype=spec.dtype)
        ids = torch.randint(2, config.vocab_size, (B, S))
    stock.requires_grad_(False).eval()
    models = {OURS: patch(share(stock)), EAGER: stock, SDPA: share(stock, "sdpa")}
    new = 3 if options.quick else NEW_TOKENS
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    generation = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "num_beams": beams}
    calls = {}
    for name in contenders(spec, options):
        if name in _ctranslate2.KINDS:
            calls[name] = Contender(_ctranslate2.generator(name, stock, ids, options, new, beams))
            continue
        model, how = models.get(GRAPHED.get(name, name)), generation
        if name == STATIC:
            model, how = with_static_cache(stock, options), generation | {"cache_implementation": "static"}
        generate = graphed(model).generate if name in GRAPHED else model.generate
        calls[name] = Contender(partial(generate, **batch, **how))
    weights = sum(parameter.nbytes for parameter in stock.parameters())
    check = partial(check_generation, models, calls, batch)
    return Case("generate", spec, calls, weights, check, {}, calls=None if options.quick else 1)


def with_static_cache(stock: Any, options: Options) -> Any:
    """generate compiles it by itself on a GPU and leaves that on the model; a user can on a CPU, weights frozen."""
    model = share(stock, "sdpa")
    if options.device == "cpu":
        model.forward = torch.compile(model.forward, options={"freezing": True})
    return model


def check_generation(models: dict[str, Any], calls: dict[str, Contender], batch: dict[str, Tensor]) -> None:
    """Equal logits, and in fp32 equal tokens: random weights give no token a lead that fewer bits could not turn."""
    tokens = calls[EAGER].call()
    rows = len(batch["input_ids"])
    with torch.no_grad():
        results = {
            name: model(**batch, decoder_input_ids=tokens[:rows]).logits for name, model in models.items()
        }
    stock = results[EAGER]
    for logits in results.values():
        assert_near(logits, stock)
    for name, contender in calls.items():
        found = contender.call()  # in any case: what is compiled is so now
        exact = stock.dtype == torch.float32 and not _ctranslate2.KINDS.get(name)
        assert not exact or torch.equal(found, tokens)


def test_alone(time_alone):
    time_alone()


def test_together(time_together):
    time_together()


if __name__ == "__main__":
    main(specs, build)

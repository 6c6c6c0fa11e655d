# SPDX-License-Identifier: Apache-2.0
"""One prompt-tuning step of a whole frozen T5, forward + backward to the input embeddings: patched beside stock.

Random weights in the shapes of v1.1-small and v1.1-base, train mode, a right-padded batch of P + S encoder rows, T
labels; on a CPU in fp32, and v1.1-small in bf16, too, where PyTorch has instructions for it. Saved bytes are what
autograd keeps for backward, parameters left out; peak bytes are what a step takes in all.

fastprompt's goals count for memory="speed"; the other policies trade time for bytes, from which they follow. On a GPU
the step is also run as a CUDA graph (fastprompt.graphed), of the patched and of the stock model, and with the functions
of Liger Kernel in the stock model where that is installed.
"""

import importlib.util
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from _harness import OURS, Call, Case, Contender, Options, Spec, assert_near, main, multiplies_bf16
from _liger import liger
from _machine import peak_bytes
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

from fastprompt import graphed, patch
from fastprompt.testing import saved_bytes, share

EAGER, SDPA, COMPILED = "HF eager", "HF sdpa", "torch.compile of HF sdpa"
LIGER = "Liger in HF sdpa"
PATCHED = {
    OURS: {"memory": "speed", "lm_loss": True},
    "fastprompt, balanced": {"memory": "balanced", "lm_loss": True},
    "fastprompt, lean": {"memory": "lean", "lm_loss": True},
    "fastprompt, minimal": {"memory": "minimal", "lm_loss": True},
}
GRAPHED = {"fastprompt, graphed": OURS, "HF sdpa, graphed": SDPA}  # on a GPU: what is recorded
MODELS = {
    "v1.1-small": {"d_model": 512, "d_ff": 1024, "num_layers": 8, "num_heads": 6, "d_kv": 64},
    "v1.1-base": {"d_model": 768, "d_ff": 2048, "num_layers": 12, "num_heads": 12, "d_kv": 64},
    "v1.1-xl": {"d_model": 2048, "d_ff": 5120, "num_layers": 24, "num_heads": 32, "d_kv": 64},
    "v1.1-xxl": {"d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "d_kv": 64},
    "tiny": {"d_model": 32, "d_ff": 64, "num_layers": 2, "num_heads": 2, "d_kv": 16, "vocab_size": 100},
}
SMALL = ("v1.1-small", "v1.1-base")  # on a GPU: torch.compile takes minutes for the larger ones
ALONE = "v1.1-xxl"  # where 80 GB hold a step of ours, and of nobody else
# Contender's time in ours, without and with dropout.
GOALS = {
    "cpu": {"v1.1-small": (1.35, 1.8), "v1.1-base": (1.35, 1.8)},
    "cuda": {"v1.1-small": (4.0, 4.0), "v1.1-base": (2.5, 2.5), "v1.1-xl": (1.6, 1.6)},
}
P = 100


def specs(options: Options) -> list[Spec]:
    if options.quick:
        return [Spec("tiny", torch.float32, (("B", 2), ("S", 12), ("T", 4)), True, p) for p in (0.0, 0.1)]
    if options.device == "cuda":
        sizes = [(model, 8, 512, 8) for model in ("v1.1-small", "v1.1-base", "v1.1-xl")] + [
            (ALONE, 32, 512, 8)
        ]
    elif options.all_shapes:
        batch = {"v1.1-small": 8, "v1.1-base": 4}
        sizes = [(model, batch[model], S, T) for model in batch for S in (128, 256) for T in (8, 32)]
    else:
        sizes = [("v1.1-small", 8, 128, 8), ("v1.1-base", 4, 128, 32)]
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    tables = [
        Spec(
            model,
            dtype,
            (("B", B), ("S", S), ("T", T)),
            (model, S, T) == ("v1.1-small", 128, 8)
            or (options.device == "cuda" and model in SMALL and p > 0.0),
            p,
        )
        for p in (0.1, 0.0)
        for model, B, S, T in sizes
    ]
    if multiplies_bf16(options):
        tables += [replace(spec, dtype=torch.bfloat16, headline=False) for spec in tables if spec.headline]
    return tables


def contenders(spec: Spec, options: Options) -> list[str]:
    on_gpu = options.device == "cuda"
    if spec.what == ALONE:
        return [*PATCHED]
    theirs = [EAGER, SDPA]
    if (spec.headline and not options.quick) or (options.all_shapes and not on_gpu):
        theirs.append(COMPILED)
    if on_gpu and importlib.util.find_spec("liger_kernel"):
        theirs.append(LIGER)
    recorded = [*GRAPHED] if on_gpu else []
    if spec.what == "v1.1-xl":
        recorded = recorded[:1]  # a graph keeps its memory, and HF's needs much
    return [*PATCHED, *theirs, *recorded]


def build(spec: Spec, options: Options) -> Case:
    B, S, T = (size for _, size in spec.sizes)
    config = T5Config(
        **MODELS[spec.what],
        feed_forward_proj="gated-gelu",
        dropout_rate=spec.dropout_p,
        decoder_start_token_id=0,
    )
    torch.manual_seed(0)
    with torch.device(options.device):
        stock = T5ForConditionalGeneration._from_config(config, attn_implementation="eager", dtype=spec.dtype)
    stock.requires_grad_(False).train()
    L = S if options.quick else P + S
    embeds = torch.randn(B, L, config.d_model, device=options.device, dtype=spec.dtype, requires_grad=True)
    mask = (
        torch.arange(L, device=options.device)
        < L - S // 4 * (torch.arange(B, device=options.device)[:, None] > 0)
    ).long()
    labels = torch.randint(1, config.vocab_size, (B, T), device=options.device)

    models: dict[str, Any] = {}
    losses: dict[str, Any] = {}  # what computes a loss: a model, or what Liger makes of one
    for name in contenders(spec, options):
        kind = GRAPHED.get(name, name)
        attention = None if kind in PATCHED or kind == EAGER else "sdpa"
        model = models[name] = share(stock, attention)
        if kind in PATCHED:
            patch(model, **PATCHED[kind])
        losses[name] = liger(model) if name == LIGER else model
    calls: dict[str, Contender] = {}
    for name, model in models.items():
        forward = partial(
            losses[name], inputs_embeds=embeds, attention_mask=mask, labels=labels, use_cache=False
        )
        with saved_bytes(exclude=stock.parameters()) as saved:
            kept = forward()
        counted = None if name in (COMPILED, *GRAPHED) else saved.bytes
        del kept, saved  # which holds what it has counted
        if name == COMPILED:
            torch._dynamo.reset()
            compiled = torch.compile(model, dynamic=False)
            forward = partial(
                compiled, inputs_embeds=embeds, attention_mask=mask, labels=labels, use_cache=False
            )
        call = step(forward, embeds)
        if name in GRAPHED:
            call = step(partial(graphed(model), **forward.keywords), embeds)
        if name in (COMPILED, *GRAPHED):
            call()
        peak = None if name in GRAPHED else peak_bytes(call, options.device)
        calls[name] = Contender(call, None, counted, peak)
    stated = (spec.dtype == torch.float32) == (options.device == "cpu")
    goal = GOALS[options.device].get(spec.what, (None, None))[spec.dropout_p > 0.0] if stated else None
    goals = {EAGER: goal, SDPA: goal, LIGER: goal, COMPILED: 1.15 if options.device == "cpu" else None}
    goals = {name: value for name, value in goals.items() if name in calls and value and not options.quick}
    weights = sum(p.numel() for p in stock.parameters()) * embeds.element_size()
    check = partial(check_step, models, losses, embeds, mask, labels)
    return Case("training_step", spec, calls, 2 * weights, check, goals, calls=None if options.quick else 1)


def step(forward: Call, embeds: Tensor) -> Call:
    """-> the loss and the gradient of the encoder's input. ``forward`` returns a loss or an output that has one."""

    def run() -> tuple[Tensor, Tensor]:
        output = forward()
        loss = output if isinstance(output, Tensor) else output.loss
        return loss, torch.autograd.grad(loss, embeds)[0]

    return run


def check_step(
    models: dict[str, Any], losses: dict[str, Any], embeds: Tensor, mask: Tensor, labels: Tensor
) -> None:
    """Without dropout every model has eager's loss and gradient to the precision of the dtype."""
    results = {}
    for name, model in models.items():
        model.eval()
        forward = partial(
            losses[name], inputs_embeds=embeds, attention_mask=mask, labels=labels, use_cache=False
        )
        results[name] = step(forward, embeds)()
        model.train()
    for result in results.values():
        for ours, theirs in zip(result, results.get(EAGER, results[OURS]), strict=True):
            assert_near(ours, theirs)


def test_alone(time_alone):
    time_alone()


def test_together(time_together):
    time_together()


if __name__ == "__main__":
    main(specs, build)

# SPDX-License-Identifier: Apache-2.0
"""Prompts that are packed, the rows that they take, and whether packed results equal padded ones."""

import torch

from fastprompt.prompts import PromptConfig

CONFIGS = {
    "p5": PromptConfig(5, init="uniform"),
    "p2": PromptConfig(2, init="uniform", seed=1),
    "cached": PromptConfig(5, "cached", init="uniform"),
    "rows": PromptConfig(3, "prefix", init="uniform", seed=1),
    "decoder": PromptConfig(4, "prefix", init="uniform", sites=["decoder", "cross"], seed=2),
}
# prompts: rows in the encoder of make_batch's 7 + 6 + 5 tokens
ROWS = {
    "p5": 33,
    ("p5", "p2", "p5"): 30,
    "cached": 18,
    "rows": 18,
    ("cached", "rows", "decoder"): 18,
    "decoder": 18,
}
LAYOUTS = ("t5", "v1_1", "mt5", "umt5")
MEMORY = (None, "speed", "balanced", "lean", "minimal")


def names(prompts):
    return prompts if isinstance(prompts, str) else list(prompts)


def results(prompted, batch, prompts, **more):
    prompted.zero_grad()
    output = prompted(**batch, prompts=names(prompts), **more)
    output.loss.backward()
    found = {"loss": output.loss, "logits": output.logits}
    return found | {
        name: each.grad.clone() for name, each in prompted.prompts.named_parameters() if each.grad is not None
    }


def assert_same(ours, expected):
    assert list(ours) == list(expected)
    for name, value in expected.items():
        scale = float(value.detach().abs().max())
        assert scale > 0, name
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-5 * scale)

# SPDX-License-Identifier: Apache-2.0
"""Kind "cached" with dropout on equals HF T5 under the isolating mask, if HF drops the same elements.

A seed and a position say what dropout drops. The seeds are noted while our model runs; the stock model then draws its
masks from them: for the prompt's rows those of the prompt's own run, which all examples of the batch share.
"""

from collections import defaultdict

import pytest
import torch
from exactness import GRADIENT, assert_exact
from torch import nn

from fastprompt.modules import attention, dropout, ff
from fastprompt.ops import _dropout
from fastprompt.ops._dropout import keep_mask, keep_scale
from fastprompt.ops._t5_attention_reference import keep_keys
from fastprompt.prompts import PromptConfig

P, DROPPED = 5, 0.25  # a probability that 16 bits hold exactly


@pytest.fixture
def calls(monkeypatch):
    """The modules that are running, outermost first, each with its input's shape."""
    running, call = [], nn.Module.__call__

    def noted(self, *args, **kwargs):
        running.append((self, tuple(args[0].shape) if args and isinstance(args[0], torch.Tensor) else ()))
        try:
            return call(self, *args, **kwargs)
        finally:
            running.pop()

    monkeypatch.setattr(nn.Module, "__call__", noted)
    return running


def draws(prompted, batch, calls, monkeypatch):
    """Our output, and by a module's name the (seed, shape) of each of its draws."""
    names = {module: name for name, module in prompted.model.named_modules()}
    found = defaultdict(list)

    drawn = _dropout.new_seed

    def new_seed(device):
        module, shape = calls[-1]
        found[names[module]].append((drawn(device), shape))
        return found[names[module]][-1][0]

    with monkeypatch.context() as patched:
        for drawing in (attention, dropout, ff, _dropout):
            patched.setattr(drawing, "new_seed", new_seed)
        patched.setattr(
            nn.Dropout, "forward", lambda self, x: _dropout.dropout(x, new_seed(x.device), self.p)
        )
        output = prompted(**batch)
        output.loss.backward()
    return output, by_hf_module(found)


def by_hf_module(found):
    """A fused layer draws for two dropouts of HF's, in turn: of its weights or its inner activation, and its own."""
    split = {}
    for name, drawn in found.items():
        kind = name.rpartition(".")[2]
        if kind in ("0", "1", "2"):  # encoder.block.3.layer.1
            split[f"{name}.inner"], split[f"{name}.dropout"] = drawn[0::2], drawn[1::2]
        elif kind in ("SelfAttention", "EncDecAttention"):
            split[f"{name.rpartition('.')[0]}.inner"] = drawn
        else:
            split[name.replace("DenseReluDense.dropout", "inner")] = drawn
    return split


class SharedDropout:
    """HF's dropout functions on the masks of ``drawn``."""

    def __init__(self, model, drawn, calls):
        self.names = {module: name for name, module in model.named_modules()}
        self.drawn, self.calls, self.used = drawn, calls, defaultdict(int)
        self.H = model.config.num_heads

    def next(self, name):
        """Of an encoder the draws of the prompt's run and of the tokens' run, of a decoder its own."""
        drawn, number = self.drawn[name], self.used[name]
        self.used[name] += 1
        assert number < len(drawn), f"{name} drops more often than ours"
        return drawn[number :: len(drawn) // 2] if name.startswith("encoder") else [drawn[number]]

    def of_rows(self, module, x):
        name = self.names[module].replace("DenseReluDense.dropout", "inner")
        masks = [keep_mask((*shape[:2], x.shape[2]), DROPPED, seed) for seed, shape in self.next(name)]
        keep = torch.cat([mask.expand(len(x), -1, -1) for mask in masks], 1)
        return x * keep * keep_scale(DROPPED)

    def of_weights(self, weights, p, training):
        B, _, T, keys = weights.shape
        name = self.names[self.calls[-1][0]].rpartition(".")[0] + ".inner"
        *prompt, (seed, _) = self.next(name)
        own = T - (P if prompt else 0)
        keep = torch.stack([keep_keys(seed, b * self.H, self.H, own, keys, DROPPED) for b in range(B)])
        for seed, _ in prompt:
            mine = keep_keys(seed, 0, self.H, P, P, DROPPED)
            beside = mine.new_ones(self.H, P, keys - P)  # keys that the prompt does not see
            keep = torch.cat([torch.cat([mine, beside], 2).expand(B, -1, -1, -1), keep], 2)
        return weights * keep * keep_scale(p)


@pytest.mark.parametrize("layout", ["t5", "v1_1", "byt5", "umt5"])
@pytest.mark.parametrize("memory", [None, "speed", "balanced", "lean"])
def test_the_same_masks_give_the_same_step(
    layout, memory, make_keyed, make_model, make_batch, hf, calls, monkeypatch
):
    # As many targets as a head is wide: fewer are scored against the encoder's output, in another order of weights.
    batch = make_batch("left", T=16)
    configs = {"p": PromptConfig(P, "cached", init="uniform")}
    prompted = make_keyed(configs, layout, memory, dropout_rate=DROPPED)
    plain = prompted(**batch).logits
    torch.manual_seed(3)
    ours, drawn = draws(prompted.train(), batch, calls, monkeypatch)

    stock = make_model(layout, d_kv=16, dropout_rate=DROPPED).requires_grad_(False).train()
    shared = SharedDropout(stock, drawn, calls)
    monkeypatch.setattr(nn.Dropout, "forward", lambda module, x: shared.of_rows(module, x))
    monkeypatch.setattr(nn.functional, "dropout", shared.of_weights)
    prompt = prompted.prompts["p"].detach().clone().requires_grad_()
    expected = hf(stock, prompt, batch, labels=batch["labels"])
    expected.loss.backward()
    for name, each in drawn.items():
        assert shared.used[name] == len(each) // (2 if name.startswith("encoder") else 1), name

    assert_exact(ours.logits, expected.logits)
    assert_exact(ours.loss, expected.loss)
    assert_exact(prompted.prompts["p"].grad, prompt.grad, GRADIENT)
    assert (plain - ours.logits).abs().max() > 1e-2, "dropout was on"

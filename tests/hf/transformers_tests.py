# SPDX-License-Identifier: Apache-2.0
"""transformers' own model tests, on stock models and on patched ones: what passes there passes here.

`make hf-tests` runs this file; its name keeps it out of a plain pytest. Each test runs one of theirs twice. Models are
patched when they are made and when they are loaded. "trained": as made, so every layer falls back. "frozen": blocks and
norms need no gradient, embeddings and heads do, so that training runs the fused layers' backward, too. What models
return must be the same both times, until one of them drops out.
"""

import random
import unittest
from contextlib import contextmanager
from unittest import mock

import numpy
import pytest
import torch
import transformers_models
from torch.utils._pytree import tree_leaves, tree_map
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

import fastprompt
from fastprompt.modules._frozen_attention import FrozenAttention
from fastprompt.modules.ff import FrozenFF

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}  # of the largest value
CASES = transformers_models.CASES
# From 5.24 on it wants every stack's configuration to name the attention that was set, where a patched one names
# fastprompt's.
LEFT_OUT = {"test_can_set_attention_dynamically"}
NAMES = [
    (case, name)
    for case, cls in CASES.items()
    for name in unittest.TestLoader().getTestCaseNames(cls)
    if name not in LEFT_OUT
]


def freeze(model):
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and hasattr(module, "final_layer_norm"):
            module.block.requires_grad_(False)
            module.final_layer_norm.requires_grad_(False)


@contextmanager
def models(*changes):
    """Every model that is made or loaded here goes through ``changes``."""

    def changed(model):
        for change in changes:
            change(model)

    post_init, load = PreTrainedModel.post_init, PreTrainedModel.from_pretrained.__func__

    def made(self):
        post_init(self)
        changed(self)

    def loaded(cls, *args, **kwargs):
        result = load(cls, *args, **kwargs)
        changed(result[0] if isinstance(result, tuple) else result)
        return result

    with mock.patch.multiple(PreTrainedModel, post_init=made, from_pretrained=classmethod(loaded)):
        yield


def copied(leaf):
    return leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf


def tensors_in(values):
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def assert_same(ours, theirs):
    """All of theirs is in ours. Attention weights may be in ours only: stock sdpa returns none."""
    for (_, mine), (dtype, stock) in zip(ours, theirs, strict=True):
        for name, values in stock.items():
            wanted = tensors_in(values)
            for x, y in zip(tensors_in(mine[name]) if wanted else [], wanted, strict=True):
                tolerance = TOLERANCE[dtype] * max(1.0, y.abs().max().item())
                torch.testing.assert_close(x, y, rtol=0.0, atol=tolerance, equal_nan=True)


@contextmanager
def returned():
    """What the models that are called here return in evaluation: the dtype they compute in, and tensors by name."""
    seen, call = [], PreTrainedModel.__call__
    inside = dropped = False

    def called(self, *args, **kwargs):
        nonlocal inside, dropped
        dropped = dropped or self.training
        if inside or dropped:
            return call(self, *args, **kwargs)
        inside = True
        try:
            result = call(self, *args, **kwargs)
        finally:
            inside = False
        if isinstance(result, ModelOutput):
            seen.append((self.dtype, {name: tree_map(copied, value) for name, value in result.items()}))
        return result

    with mock.patch.object(PreTrainedModel, "__call__", called):
        yield seen


def outcome(case, name):
    """{part of the test: how it failed}, and why it was skipped, if it was."""
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)
    transformers_models.common.global_rng.seed(0)
    result = unittest.TestResult()
    test = CASES[case](name)
    test.run(result)
    failed = {part.id(): trace for part, trace in (*result.failures, *result.errors)}
    skipped = [reason for part, reason in result.skipped if part is test]
    return failed, skipped[0] if skipped else None


@pytest.fixture
def fused(monkeypatch):
    """How many fused layers ran."""
    calls = []
    for function in (FrozenFF, FrozenAttention):

        def counted(*args, forward=function.forward):
            calls.append(None)
            return forward(*args)

        monkeypatch.setattr(function, "forward", staticmethod(counted))
    return calls


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("case", "name", "weights"),
    [(*each, "frozen") for each in NAMES] + [(*each, "trained") for each in NAMES if each[0] == "t5"],
)
def test_as_stock(case, name, weights, fused, record_property):
    first = (freeze,) if weights == "frozen" else ()
    with models(*first), returned() as theirs:
        expected, skipped = outcome(case, name)
    if skipped:
        pytest.skip(f"by transformers: {skipped}")
    assert not fused
    with models(*first, fastprompt.patch), returned() as ours:
        failed, skipped = outcome(case, name)
    record_property("stock", "fails" if expected else "passes")
    record_property("fused", len(fused))
    assert skipped is None
    worse = [trace for part, trace in failed.items() if part not in expected]
    assert not worse, "passes on the stock model:\n" + "\n".join(worse)
    if case != "umt5":  # whose decoder sees the future in transformers' sdpa, from 5.15 to 5.17
        assert_same(ours, theirs)

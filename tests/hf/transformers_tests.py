# SPDX-License-Identifier: Apache-2.0
"""transformers' own model tests, on stock models and on patched ones: what passes there passes here.

`make hf-tests` runs this file; its name keeps it out of a plain pytest. Each test runs one of theirs twice. Models are
patched when they are made and when they are loaded. "trained": as made, so every layer falls back. "frozen": blocks and
norms need no gradient, embeddings and heads do, so that training runs the fused layers' backward, too.
"""

import random
import unittest
from contextlib import contextmanager
from unittest import mock

import numpy
import pytest
import torch
import transformers_models
from transformers import PreTrainedModel

import fastprompt
from fastprompt.modules.attention import FrozenAttention
from fastprompt.modules.ff import FrozenFF

CASES = transformers_models.CASES
NAMES = [(case, name) for case, cls in CASES.items() for name in unittest.TestLoader().getTestCaseNames(cls)]


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

        def counted(*args, apply=function.apply):
            calls.append(None)
            return apply(*args)

        monkeypatch.setattr(function, "apply", counted)
    return calls


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("case", "name", "weights"),
    [(*each, "frozen") for each in NAMES] + [(*each, "trained") for each in NAMES if each[0] == "t5"],
)
def test_as_stock(case, name, weights, fused, record_property):
    first = (freeze,) if weights == "frozen" else ()
    with models(*first):
        expected, skipped = outcome(case, name)
    if skipped:
        pytest.skip(f"by transformers: {skipped}")
    assert not fused
    with models(*first, fastprompt.patch):
        failed, skipped = outcome(case, name)
    record_property("stock", "fails" if expected else "passes")
    record_property("fused", len(fused))
    assert skipped is None
    worse = [trace for part, trace in failed.items() if part not in expected]
    assert not worse, "passes on the stock model:\n" + "\n".join(worse)

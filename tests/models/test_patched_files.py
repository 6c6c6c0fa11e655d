# SPDX-License-Identifier: Apache-2.0
"""A patched model is saved, loaded, copied and pickled as any other."""

import copy
import pickle

import pytest
import torch
from layouts import classes, close, step

import fastprompt
from fastprompt import explain, patch

pytestmark = pytest.mark.usefixtures("one_thread")


def test_save_load_copy_and_pickle(make, batch, labels, tmp_path):
    model = make()
    expected = step(model, batch(), labels)
    patch(model).save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).requires_grad_(False)
    assert not any(hasattr(cls, "stock_class") for cls in classes(loaded))
    for other in (loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for ours, theirs in zip(step(other.to(model.device), batch(), labels), expected, strict=True):
            close(ours, theirs)
    assert classes(pickle.loads(pickle.dumps(model))) == classes(model)


def test_a_shallow_copy_of_a_configuration_is_one(make):
    """As transformers makes them: what is set on it is not the model's."""
    model = patch(make())
    mine = copy.copy(model.encoder.config)
    mine.d_ff = 999
    assert model.encoder.config.d_ff == model.config.d_ff == 40
    assert mine._attn_implementation == model.encoder.config._attn_implementation == "fastprompt"


def test_a_pickle_may_be_read_before_anything_was_patched(make, batch, labels, monkeypatch):
    """As in another process."""
    model = patch(make(), lm_loss=True)
    expected, stored = model(**batch(), labels=labels).loss, pickle.dumps(model)
    for name, found in list(vars(fastprompt.modules).items()):
        if "stock_class" in getattr(found, "__dict__", {}):
            monkeypatch.delitem(vars(fastprompt.modules), name)
    loaded = pickle.loads(stored)
    assert str(explain(loaded)) == str(explain(model))
    assert torch.equal(loaded(**batch(), labels=labels).loss, expected)
    assert not hasattr(
        fastprompt.modules, "FastUdopForConditionalGeneration"
    )  # which computes something else

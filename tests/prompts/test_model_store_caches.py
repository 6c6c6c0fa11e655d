# SPDX-License-Identifier: Apache-2.0
"""Kept keys of a store's prompts: they outlive the rows in memory, and go with the prompt that they are of."""

import pytest
import torch
from bank import KINDS, logits, same

from fastprompt.prompts import PromptConfig, PromptStore, keyed, write_store
from fastprompt.prompts.loading import file_of


@pytest.fixture
def branches(monkeypatch):
    """The number of prompts in each run of the cached prompts' branch."""
    seen, run = [], keyed.run_branch
    monkeypatch.setattr(
        keyed, "run_branch", lambda model, prompts: seen.append(len(prompts)) or run(model, prompts)
    )
    return seen


def test_kept_keys_of_stored_prompts_outlive_their_rows(stored, empty, make_batch, branches):
    model, batch = empty(), make_batch()
    model.attach_store(stored, keep_bytes=0)
    expected = logits(model, batch, "cached")
    model.cache_prompts(["cached", "rows"])
    branches.clear()
    for names in ("cached", "kv", "mlp", ["rows", "kv", "mlp"], "cached"):  # each puts others out of memory
        logits(model, batch, names)
    assert branches == []
    same(logits(model, batch, "cached"), expected)


def test_kept_and_saved_prompts_leave_the_stores_memory_alone(
    stored, empty, make_batch, tmp_path, monkeypatch
):
    reads, read = [], PromptStore.__getitem__
    monkeypatch.setattr(PromptStore, "__getitem__", lambda self, name: reads.append(name) or read(self, name))
    model, batch = empty(), make_batch()
    model.attach_store(stored, keep_bytes=4 * 5 * 32)  # one prompt of rows, beside the batch's
    model.cache_prompts(["rows", "kv", "mlp"])
    reads.clear()
    for name in ("cached", "prepend") * 3:
        logits(model, batch, name)
    assert reads == ["cached", "prepend"]
    model.drop_caches()
    for name in KINDS:
        model.save_prompt(name, tmp_path / name)
    assert len(model.prompts._stored._kept) <= 1
    for name in ("rows", "kv", "mlp"):
        model.save_cache(name, tmp_path / name)
    assert len(model.prompts._stored._kept) <= 1


@pytest.mark.parametrize("own", [False, True])
def test_stale_keys_of_stored_prompts_are_made_again(own, stored, empty, make_batch, branches):
    model, batch = empty(), make_batch()
    model.attach_store(stored)
    if own:
        model.add_prompt("mine", KINDS["cached"])
    names = ["cached", "mine", "rows"] if own else ["cached", "kv", "rows"]
    model.cache_prompts(names)
    with torch.no_grad():
        model.model.get_encoder().block[1].layer[0].SelfAttention.k.weight.mul_(1.5)
    branches.clear()
    after = logits(model, batch, names)
    assert branches == [1 + own]
    assert model._caches.names == set(names)
    logits(model, batch, names)
    assert branches == [1 + own], "kept again"
    model.drop_caches()
    same(logits(model, batch, names), after)


def test_kept_keys_go_with_the_prompt_they_are_of(bank, stored, empty, make_batch, tmp_path):
    model, batch = empty(), make_batch()
    model.attach_store(stored)
    model.cache_prompts(["cached", "rows"])
    model.add_prompt("cached", KINDS["prepend"])  # hides the stored one
    assert model._caches.names == {"rows"}
    with torch.no_grad():
        model.model.get_encoder().block[1].layer[0].SelfAttention.k.weight.mul_(1.5)
    logits(model, batch, "rows")
    model.remove_prompt("cached")
    model.cache_prompts("cached")
    bank.prompts["cached"].data += 1.0
    files = {name: file_of(bank.prompts[name], "cached", None, name) for name in ("cached",)}
    write_store(tmp_path / "other", files)
    model.attach_store(PromptStore(tmp_path / "other"))
    assert model._caches.names == set()
    found = logits(model, batch, "cached")
    model.load_prompt("own", PromptStore(tmp_path / "other")["cached"])
    same(found, logits(model, batch, "own"))
    model.cache_prompts("cached")
    model.attach_store(None)
    assert model._caches.names == set()


def test_a_prompt_that_begins_from_a_stored_one_leaves_the_stores_memory_alone(stored, empty):
    model = empty()
    model.attach_store(stored, keep_bytes=0)
    model.add_prompt("own", PromptConfig(5, "cached", init="prompt", source="cached"))
    assert not model.prompts._stored._kept


def test_a_renamed_prompt_leaves_no_keys_of_the_stored_one_that_it_hides(stored, empty):
    model = empty()
    model.add_prompt("own", KINDS["cached"])
    model.attach_store(stored)
    model.cache_prompts("rows")
    model.rename_prompt("own", "rows")
    assert model._caches.names == set()

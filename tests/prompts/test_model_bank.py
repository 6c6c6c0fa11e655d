# SPDX-License-Identifier: Apache-2.0
"""PromptModel's bank: prompts are renamed, removed and frozen."""

import threading

import pytest
import torch
from bank import KINDS, logits, same
from threads import frequent_turns

from fastprompt.prompts import PromptConfig


def test_rename_keeps_the_parameters_the_place_and_the_cache_true(bank, make_batch):
    batch, parameter = make_batch(), bank.prompts["prepend"]
    before = {name: logits(bank, batch, name) for name in KINDS}
    bank.eval().cache_prompts()
    bank.rename_prompt("prepend", "first")
    bank.rename_prompt("cached", "second")
    assert list(bank.prompts) == list(bank.configs) == ["first", "second", "rows", "kv", "mlp"]
    assert bank._caches.names == {"second", "rows", "kv", "mlp"}, "nothing is kept of a name that is gone"
    assert bank.prompts["first"] is parameter
    assert bank.configs["second"] == KINDS["cached"]
    same(logits(bank, batch, None), before["prepend"])  # still the first
    same(logits(bank, batch, "second"), before["cached"])
    bank.rename_prompt("rows", "cached")  # a name that was free again
    same(logits(bank, batch, "cached"), before["rows"])
    with pytest.raises(ValueError, match="there is no prompt 'prepend' in the bank; there are"):
        bank.rename_prompt("prepend", "x")
    with pytest.raises(ValueError, match="there is a prompt 'kv' already"):
        bank.rename_prompt("first", "kv")
    with pytest.raises(ValueError, match="a prompt's name must be a str"):
        bank.rename_prompt("first", "a.b")
    assert list(bank.prompts) == ["first", "second", "cached", "kv", "mlp"]
    assert next(iter(bank.state_dict())) == "prompts.first"


def test_remove(bank, empty, make_batch):
    bank.cache_prompts()
    for name in ("prepend", "rows"):
        bank.remove_prompt(name)
    assert list(bank.prompts) == list(bank.configs) == ["cached", "kv", "mlp"]
    assert bank._caches.names == {"cached", "kv", "mlp"}
    assert not any("rows" in key or "prepend" in key for key in bank.state_dict())
    with pytest.raises(ValueError, match="there is no prompt 'rows'; there are"):
        bank(**make_batch(), prompts="rows")
    with pytest.raises(ValueError, match="there is no prompt 'rows' in the bank"):
        bank.remove_prompt("rows")
    alone = empty()
    for model in (bank, alone):
        model.add_prompt("rows", KINDS["prepend"])  # the name is free, for another kind too
    same(logits(bank, make_batch(), "rows"), logits(alone, make_batch(), "rows"))


@pytest.mark.parametrize("name", KINDS)
def test_a_frozen_prompt_does_not_train(name, bank, make_batch):
    count = bank.num_trainable_parameters
    bank.freeze_prompt(name)
    own = _parameters(bank.prompts[name])
    assert bank.num_trainable_parameters == count - sum(each.numel() for each in own)
    if name == "prepend":
        assert not bank(**make_batch(), prompts=name).loss.requires_grad
    else:
        mate = "cached" if name != "cached" else "rows"
        bank(**make_batch(), prompts=[name, mate, name]).loss.backward()
        assert all(each.grad is None for each in own)
        assert any(each.grad.abs().sum() > 0 for each in _parameters(bank.prompts[mate]))
    bank.freeze_prompt(name, False)
    bank(**make_batch(), prompts=name).loss.backward()
    assert bank.num_trainable_parameters == count
    assert any(each.grad.abs().sum() > 0 for each in own)


def _parameters(prompt):
    return [prompt] if isinstance(prompt, torch.Tensor) else list(prompt.parameters())


def test_a_prompts_kind_is_known_when_others_can_name_it(bank, tmp_path, monkeypatch):
    """A cached prompt of no kind yet would run as rows in another thread."""
    bank.save_prompt("cached", tmp_path / "cached.safetensors")
    add, seen = bank._add, []

    def seeing(name, prompt):
        add(name, prompt)
        seen.append(bank.kind(name))

    monkeypatch.setattr(bank, "_add", seeing)
    bank.add_prompt("new", PromptConfig(3, "cached", init="uniform"))
    bank.load_prompt("loaded", tmp_path / "cached.safetensors")
    assert seen == ["cached", "cached"]


def test_other_prompts_are_there_while_one_is_renamed(bank):
    wrong, done = [], threading.Event()

    def use():
        try:
            while not done.is_set():
                found = [bank.prompts.select(names, 1).names for names in (None, "rows")]
                wrong.extend(names for names in found if names not in (["prepend"], ["rows"]))
        except Exception as error:
            wrong.append(error)

    thread = threading.Thread(target=use)
    with frequent_turns():
        thread.start()
        try:
            for _ in range(2000):
                bank.rename_prompt("cached", "other")
                bank.rename_prompt("other", "cached")
        finally:
            done.set()
            thread.join()
    assert not wrong

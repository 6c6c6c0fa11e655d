# SPDX-License-Identifier: Apache-2.0
"""A store beside the bank: batches name its prompts, which are read when they are needed."""

import copy
import pickle
from functools import partial

import pytest
import torch
from bank import SIZES, logits, same
from threads import at_once

from fastprompt.prompts import PromptFile, PromptStore, write_prompt


@pytest.mark.parametrize("names", ["prepend", "kv", ["rows", "cached", "mlp"], ["cached", "kv", "cached"]])
def test_a_batch_may_name_prompts_of_a_store(names, bank, stored, empty, make_batch):
    model, batch = empty(), make_batch()
    model.attach_store(stored)
    same(logits(model, batch, names), logits(bank, batch, names))
    how = {"max_new_tokens": 5, "do_sample": False}
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    assert torch.equal(
        model.generate(**inputs, prompts=names, **how), bank.generate(**inputs, prompts=names, **how)
    )
    assert model.num_trainable_parameters == 0
    assert not model.state_dict()
    assert not model(**batch, prompts=names).loss.requires_grad


def test_stored_and_own_prompts_in_one_batch(bank, stored, empty, make_batch):
    model, batch = empty(), make_batch()
    model.load_prompt("own", stored["cached"])
    model.attach_store(stored)
    names = ["own", "rows", "cached"]
    model(**batch, prompts=names).loss.backward()
    bank(**batch, prompts=["cached", "rows", "cached"]).loss.backward()
    expected = bank.prompts["cached"].grad  # of rows 0 and 2
    assert (model.prompts["own"].grad - expected).abs().max() > 0
    bank.zero_grad()
    bank.load_prompt("other", stored["cached"])
    bank(**batch, prompts=["other", "rows", "cached"]).loss.backward()
    torch.testing.assert_close(model.prompts["own"].grad, bank.prompts["other"].grad, rtol=1e-5, atol=1e-6)
    model.load_prompt("rows", stored["cached"])  # hides the stored one
    same(logits(model, batch, "rows"), logits(bank, batch, "cached"))


def test_reads_are_few_and_memory_is_bounded(stored, empty, make_batch, monkeypatch):
    reads = []
    read = PromptStore.__getitem__
    monkeypatch.setattr(PromptStore, "__getitem__", lambda self, name: reads.append(name) or read(self, name))
    model, batch = empty(), make_batch()
    model.attach_store(stored)
    assert reads == []
    for _ in range(3):
        logits(model, batch, ["rows", "cached", "mlp"])
    assert sorted(reads) == ["cached", "mlp", "rows"]
    model.attach_store(stored, keep_bytes=0)  # what a batch uses stays all the same
    reads.clear()
    logits(model, batch, ["rows", "cached", "mlp"])
    assert sorted(reads) == ["cached", "mlp", "rows"]
    logits(model, batch, ["rows", "cached", "rows"])
    logits(model, batch, ["mlp", "cached", "rows"])
    assert reads[3:] == ["mlp"]


def test_of_a_stores_prompts_the_last_ones_used_stay(stored, empty, make_batch, monkeypatch):
    reads, read = [], PromptStore.__getitem__
    monkeypatch.setattr(PromptStore, "__getitem__", lambda self, name: reads.append(name) or read(self, name))
    model, batch = empty(), make_batch()
    model.attach_store(stored, keep_bytes=4 * 5 * 32)  # one prompt of rows, beside the batch's
    for name in ("cached", "prepend", "cached", "rows", "cached"):
        logits(model, batch, name)
    assert reads == ["cached", "prepend", "rows"]


def test_threads_share_a_stores_prompts(stored, empty, bank):
    """While each puts those of the others out of memory."""
    model = empty()
    model.attach_store(stored, keep_bytes=0)
    shared, wrong = model.prompts._stored, []

    def use(name):
        for _ in range(4000):
            if not torch.equal(shared.prompt(name), bank.prompts[name]):
                wrong.append(name)
            shared.trim([name])

    assert not at_once(partial(use, name) for name in ("prepend", "cached") * 3)
    assert not wrong


def test_a_store_moves_copies_and_detaches_with_the_model(stored, empty, make_batch):
    model, batch = empty(), make_batch()
    model.attach_store(stored)
    expected = logits(model, batch, "cached")
    twin = copy.deepcopy(model)
    stored.close()
    same(logits(twin, batch, "cached"), expected)
    assert torch.equal(
        logits(twin, batch, "prepend"), logits(pickle.loads(pickle.dumps(twin)), batch, "prepend")
    )
    half = logits(twin.bfloat16(), batch, "rows")  # prompts stay fp32
    assert half.dtype == torch.bfloat16
    assert twin.prompts.select("rows", 1).prompts[0].tensors()["cross"].dtype == torch.float32
    twin.to("meta")
    assert twin.prompts.select("rows", 1).prompts[0].tensors()["cross"].device.type == "meta"
    twin.attach_store(None)
    with pytest.raises(ValueError, match=r"there is no prompt\. Add one with"):
        twin.prompts.select("rows", 1)


def test_a_folder_is_a_store_too(bank, empty, make_batch, tmp_path):
    for name in ("prepend", "rows"):
        bank.save_prompt(name, tmp_path / f"{name}.safetensors")
    write_prompt(tmp_path / "narrow.safetensors", PromptFile(torch.zeros(2, 8)))
    model, batch = empty(), make_batch()
    model.attach_store(PromptStore(tmp_path))
    same(logits(model, batch, "rows"), logits(bank, batch, "rows"))
    with pytest.raises(ValueError, match=r"PromptModel: 'narrow' of .*\[P, 32\].* got \[2, 8\]"):
        logits(model, batch, "narrow")


def test_errors(bank, stored, make_keyed, make_batch, tmp_path):
    batch = make_batch()
    other = make_keyed({}, **SIZES)
    other.model.shared.weight.data[3] *= 2
    with pytest.raises(ValueError, match=r"store belongs to another model: embedding table .*strict=False"):
        other.attach_store(stored)
    other.attach_store(stored, strict=False)
    logits(other, batch, "prepend")
    with pytest.raises(ValueError, match=r"there is no prompt 'x'; there are .* and 5 in .*store"):
        logits(other, batch, "x")
    with pytest.raises(ValueError, match="must name prompts of the store: the bank has none of its own"):
        logits(other, batch, None)
    with pytest.raises(
        ValueError, match="'prepend' of kind 'prepend' and prompt 'kv' of kind 'prefix' cannot"
    ):
        logits(other, batch, ["prepend", "kv", "kv"])
    with pytest.raises(ValueError, match="there is no prompt 'kv' in the bank"):
        other.freeze_prompt("kv", False)
    with pytest.raises(ValueError, match="there is no prompt 'nope'; there are"):
        other.kind("nope")
    narrow = make_keyed({}, **SIZES, d_kv=12)
    narrow.attach_store(stored, strict=False)
    for name in ("cached", "rows"):
        for call in (
            lambda name=name: logits(narrow, batch, name),
            lambda name=name: narrow.cache_prompts(name),
        ):
            with pytest.raises(ValueError, match=r"needs heads of width d_kv in .* got 12"):
                call()
    with pytest.raises(TypeError, match="store must be a PromptStore, got PosixPath"):
        other.attach_store(stored.path)
    with pytest.raises(TypeError, match="keep_bytes must be an int, got str"):
        other.attach_store(stored, strict=False, keep_bytes="1")
    with pytest.raises(ValueError, match="keep_bytes must not be negative, got -1"):
        other.attach_store(stored, strict=False, keep_bytes=-1)
    bank.save_prompt("prepend", tmp_path / "folder" / "p.safetensors")
    other.attach_store(PromptStore(tmp_path / "folder"))
    with pytest.raises(ValueError, match=r"'p' of .* belongs to another model"):
        logits(other, batch, "p")


def test_a_thread_that_trims_meets_prompts_that_others_read(stored, empty):
    model = empty()
    model.attach_store(stored, keep_bytes=0)
    shared = model.prompts._stored
    for name in ("prepend", "cached"):
        shared.prompt(name)

    class Used(tuple):
        def __contains__(self, name):
            shared.prompt("rows")  # as another thread does meanwhile
            return name == "rows"

    shared.trim(Used())
    assert list(shared._kept) == ["rows"]


def test_a_stored_prompt_that_was_read_in_inference_mode_serves_training(stored, make_keyed, make_batch):
    """Of the model itself: autograd saves nothing of inference mode's."""
    model, batch = make_keyed({}, **(SIZES | {"dtype": torch.float32})), make_batch()
    model.attach_store(stored, strict=False)
    with torch.inference_mode():
        logits(model, batch, "kv")
    q = model.model.get_decoder().block[0].layer[0].SelfAttention.q.weight.requires_grad_()
    model(**batch, prompts="kv").loss.backward()
    assert q.grad.abs().sum() > 0

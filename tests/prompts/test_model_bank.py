# SPDX-License-Identifier: Apache-2.0
"""PromptModel's bank: prompts of every kind are saved, loaded, renamed, removed, frozen; a store serves batches.

In float64: where prompts of other kinds are, attention runs on other functions, which round differently.
"""

import copy
import pickle
import sys
import threading

import pytest
import torch

from fastprompt.prompts import (
    PromptConfig,
    PromptFile,
    PromptStore,
    keyed,
    read_prompt,
    write_prompt,
    write_store,
)
from fastprompt.prompts.loading import file_of

KINDS = {
    "prepend": PromptConfig(5, seed=1),
    "cached": PromptConfig(5, "cached", seed=2),
    "rows": PromptConfig(3, "prefix", seed=3),
    "kv": PromptConfig(6, "prefix", parameterization="kv", sites=("decoder", "cross"), seed=4),
    "mlp": PromptConfig(2, "prefix", mlp=8, seed=5),
}
SIZES = {"num_layers": 3, "num_decoder_layers": 2, "dtype": torch.float64}


@pytest.fixture
def tuned(make_keyed):
    """One prompt of each kind, with values of its own."""
    model = make_keyed(KINDS, **SIZES)
    for parameter in model.prompts.parameters():
        parameter.data += torch.randn_like(parameter)
    return model


@pytest.fixture
def empty(make_keyed):
    def make():
        return make_keyed({}, **SIZES)

    return make


def same(one, other):
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def logits(model, batch, prompts):
    with torch.no_grad():
        return model(**batch, prompts=prompts).logits


@pytest.mark.parametrize("name", KINDS)
def test_a_saved_prompt_of_any_kind_gives_the_same_logits(name, tuned, empty, make_batch, tmp_path):
    tuned.save_prompt(name, tmp_path / "prompt")
    other, batch = empty(), make_batch()
    other.load_prompt("p", tmp_path / "prompt")
    same(logits(other, batch, "p"), logits(tuned, batch, name))
    assert other.kind("p") == tuned.kind(name)
    assert all(parameter.requires_grad for parameter in other.prompts.parameters())
    again = other.configs["p"]
    assert (again.num_tokens, again.kind, again.sites, again.parameterization) == (
        KINDS[name].num_tokens,
        KINDS[name].kind,
        KINDS[name].sites,
        KINDS[name].parameterization,
    )
    other.save_prompt("p", tmp_path / "again")
    first, second = read_prompt(tmp_path / "prompt").tensors, read_prompt(tmp_path / "again").tensors
    assert all(torch.equal(second[key], tensor) for key, tensor in first.items())


def test_how_a_prompt_began_is_not_forgotten(tuned, empty, tmp_path):
    tuned.add_prompt("zeros", PromptConfig(3, init="zeros"))
    tuned.save_prompt("zeros", tmp_path / "first")
    other = empty()
    other.load_prompt("p", tmp_path / "first")
    other.rename_prompt("p", "q")
    other.save_prompt("q", tmp_path / "second")
    assert read_prompt(tmp_path / "second").init == "zeros"
    other.load_prompt("q", PromptFile(torch.ones(3, 32)))  # says nothing of it
    other.save_prompt("q", tmp_path / "third")
    assert read_prompt(tmp_path / "third").init == "file"
    other.remove_prompt("q")
    assert not other._inits


@pytest.mark.parametrize("name", KINDS)
def test_loading_over_a_prompt_keeps_its_parameters(name, tuned, make_batch, tmp_path):
    tuned.save_prompt(name, tmp_path / "prompt")
    batch = make_batch()
    before, parameters = logits(tuned, batch, name), dict(tuned.prompts.named_parameters())
    tuned.eval()
    if tuned.kind(name) != "prepend":
        tuned.cache_prompts(name)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(1)
    assert not torch.equal(logits(tuned, batch, name), before)
    tuned.load_prompt(name, tmp_path / "prompt")
    same(logits(tuned, batch, name), before)
    assert all(each is parameters[key] for key, each in tuned.prompts.named_parameters())


@pytest.mark.parametrize(
    ("name", "other", "message"),
    [
        ("prepend", "cached", "must be of kind 'cached' with"),
        ("cached", "prepend", "must be of kind 'prepend' with"),
        ("rows", "mlp", r"'prefix' with {'encoder': \[3, 2, 32\]"),
        ("kv", "rows", "like prompt 'rows', got 'prefix' with .*'decoder_k'"),
        ("rows", "prepend", "got 'prefix'"),
    ],
)
def test_loading_over_another_kind_of_prompt_is_refused(name, other, message, tuned, tmp_path):
    tuned.save_prompt(name, tmp_path / "prompt")
    before, configs = copy.deepcopy(tuned.state_dict()), dict(tuned.configs)
    with pytest.raises(ValueError, match=f"{message}.*Load it under another name, or begin a prompt from it"):
        tuned.load_prompt(other, tmp_path / "prompt")
    assert all(torch.equal(tensor, before[key]) for key, tensor in tuned.state_dict().items())
    assert tuned.configs == configs


def test_a_prefix_of_another_model_is_refused(tuned, make_keyed, tmp_path):
    tuned.save_prompt("rows", tmp_path / "prompt")
    deeper = make_keyed({}, num_layers=4, num_decoder_layers=2)
    with pytest.raises(ValueError, match=r"tensor 'encoder' must have shape .*=\[4, 3, 32\], as the model"):
        deeper.load_prompt("p", tmp_path / "prompt", strict=False)
    assert "p" not in deeper.prompts


@pytest.mark.parametrize("layers", [2, 3, 4])
def test_peft_prefixes_go_both_ways(layers, make_model, make_keyed, make_batch, tmp_path):
    peft = pytest.importorskip("peft")
    sizes = {"num_layers": layers, "d_kv": 16, "dtype": torch.float64}
    config = peft.PrefixTuningConfig(
        task_type="SEQ_2_SEQ_LM", num_virtual_tokens=5, token_dim=64, num_attention_heads=4
    )
    theirs = peft.get_peft_model(make_model(**sizes), config).eval()
    for parameter in theirs.prompt_encoder.parameters():
        parameter.data = torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, batch = make_keyed({}, **sizes), make_batch()
    ours.load_prompt("p", tmp_path / "theirs")
    same(logits(ours, batch, "p"), theirs(**batch).logits)

    own = PromptConfig(4, "prefix", parameterization="kv", sites=("decoder",), seed=6)
    ours.add_prompt("own", own)
    ours.save_prompt("own", tmp_path / "ours", format="peft")
    theirs = peft.PeftModel.from_pretrained(make_model(**sizes), tmp_path / "ours").eval()
    same(theirs(**batch).logits, logits(ours, batch, "own"))
    ours.add_prompt("rows", PromptConfig(4, "prefix", sites=("decoder",)))
    with pytest.raises(ValueError, match="PEFT has no 'prefix rows' prompt"):
        ours.save_prompt("rows", tmp_path / "rows", format="peft")


def continue_training(model, batch, name):
    """A few steps; the losses. The frozen model must stay as it is."""
    before = {key: value.clone() for key, value in model.model.state_dict().items()}
    optimizer = torch.optim.SGD([each for each in model.prompts.parameters() if each.requires_grad], lr=0.1)
    losses = []
    for _ in range(5):
        loss = model(**batch, prompts=name).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(torch.equal(value, before[key]) for key, value in model.model.state_dict().items())
    return losses


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, "safetensors") for name in KINDS),
        ("prepend", "npy"),
        ("prepend", "peft"),
        ("decoder", "peft"),
    ],
)
def test_training_continues_from_a_file_and_its_prompt_saves_again(
    name, kind, tuned, empty, make_batch, tmp_path
):
    tuned.add_prompt("decoder", PromptConfig(3, "prefix", parameterization="kv", sites=("decoder",), seed=7))
    tuned.save_prompt(name, tmp_path / "first", format=kind)
    model, again, batch = empty(), empty(), make_batch()
    model.load_prompt("p", tmp_path / "first")
    assert continue_training(model, batch, "p")[-1] < tuned(**batch, prompts=name).loss
    model.save_prompt("p", tmp_path / "second", format=kind)
    again.load_prompt("p", tmp_path / "second")
    assert torch.equal(logits(again, batch, "p"), logits(model, batch, "p"))


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "PREFIX_TUNING", "MULTITASK"])
def test_training_continues_from_an_adapter_of_peft(kind, empty, make_model, make_batch, tmp_path):
    peft = pytest.importorskip("peft")
    common = {"task_type": "SEQ_2_SEQ_LM", "num_virtual_tokens": 5}
    config = {
        "PROMPT_TUNING": lambda: peft.PromptTuningConfig(**common),
        "PREFIX_TUNING": lambda: peft.PrefixTuningConfig(**common, token_dim=64, num_attention_heads=4),
        "MULTITASK": lambda: peft.MultitaskPromptTuningConfig(**common, num_tasks=2),
    }[kind]()
    model = make_model(num_layers=3, num_decoder_layers=2, d_kv=16)
    peft.get_peft_model(model, config).save_pretrained(tmp_path)
    ours = empty()
    ours.load_prompt("p", tmp_path, task=1 if kind == "MULTITASK" else None)
    losses = continue_training(ours, make_batch(), "p")
    assert losses[-1] < losses[0]


def test_rename_keeps_the_parameters_the_place_and_the_cache_true(tuned, make_batch):
    batch, parameter = make_batch(), tuned.prompts["prepend"]
    before = {name: logits(tuned, batch, name) for name in KINDS}
    tuned.eval().cache_prompts()
    tuned.rename_prompt("prepend", "first")
    tuned.rename_prompt("cached", "second")
    assert list(tuned.prompts) == ["first", "second", "rows", "kv", "mlp"]
    assert tuned._caches.names == {"rows", "kv", "mlp"}, "nothing is kept of a name that is gone"
    assert tuned.prompts["first"] is parameter
    assert tuned.configs["second"] == KINDS["cached"]
    same(logits(tuned, batch, None), before["prepend"])  # still the first
    same(logits(tuned, batch, "second"), before["cached"])
    tuned.rename_prompt("rows", "cached")  # a name that was free again
    same(logits(tuned, batch, "cached"), before["rows"])
    with pytest.raises(ValueError, match="there is no prompt 'prepend' in the bank; there are"):
        tuned.rename_prompt("prepend", "x")
    with pytest.raises(ValueError, match="there is a prompt 'kv' already"):
        tuned.rename_prompt("first", "kv")
    with pytest.raises(ValueError, match="a prompt's name must be a str"):
        tuned.rename_prompt("first", "a.b")
    assert list(tuned.prompts) == ["first", "second", "cached", "kv", "mlp"]
    assert next(iter(tuned.state_dict())) == "prompts.first"


def test_remove(tuned, make_batch):
    tuned.cache_prompts()
    for name in ("prepend", "rows"):
        tuned.remove_prompt(name)
    assert list(tuned.prompts) == list(tuned.configs) == ["cached", "kv", "mlp"]
    assert not any("rows" in key or "prepend" in key for key in tuned.state_dict())
    with pytest.raises(ValueError, match="there is no prompt 'rows'; there are"):
        tuned(**make_batch(), prompts="rows")
    with pytest.raises(ValueError, match="there is no prompt 'rows' in the bank"):
        tuned.remove_prompt("rows")
    tuned.add_prompt("rows", KINDS["prepend"])  # the name is free, for another kind too
    same(logits(tuned, make_batch(), "rows"), logits(tuned, make_batch(), "rows"))


@pytest.mark.parametrize("name", KINDS)
def test_a_frozen_prompt_does_not_train(name, tuned, make_batch):
    count = tuned.num_trainable_parameters
    tuned.freeze_prompt(name)
    own = _parameters(tuned.prompts[name])
    assert tuned.num_trainable_parameters == count - sum(each.numel() for each in own)
    if name == "prepend":
        assert not tuned(**make_batch(), prompts=name).loss.requires_grad
    else:
        mate = "cached" if name != "cached" else "rows"
        tuned(**make_batch(), prompts=[name, mate, name]).loss.backward()
        assert all(each.grad is None for each in own)
        assert any(each.grad.abs().sum() > 0 for each in _parameters(tuned.prompts[mate]))
    tuned.freeze_prompt(name, False)
    tuned(**make_batch(), prompts=name).loss.backward()
    assert tuned.num_trainable_parameters == count
    assert any(each.grad.abs().sum() > 0 for each in own)


def _parameters(prompt):
    return [prompt] if isinstance(prompt, torch.Tensor) else list(prompt.parameters())


@pytest.fixture
def stored(tuned, tmp_path):
    """The store of all prompts of ``tuned``, and their own identity."""
    files = {n: file_of(tuned.prompts[n], tuned.kind(n), None, n, tuned._identity()) for n in KINDS}
    write_store(tmp_path / "store", files)
    return PromptStore(tmp_path / "store")


@pytest.mark.parametrize("names", ["prepend", "kv", ["rows", "cached", "mlp"], ["cached", "kv", "cached"]])
def test_a_batch_may_name_prompts_of_a_store(names, tuned, stored, empty, make_batch):
    model, batch = empty(), make_batch()
    model.attach_store(stored)
    same(logits(model, batch, names), logits(tuned, batch, names))
    how = {"max_new_tokens": 5, "do_sample": False}
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    assert torch.equal(
        model.generate(**inputs, prompts=names, **how), tuned.generate(**inputs, prompts=names, **how)
    )
    assert model.num_trainable_parameters == 0
    assert not model.state_dict()
    assert not model(**batch, prompts=names).loss.requires_grad


def test_stored_and_own_prompts_in_one_batch(tuned, stored, empty, make_batch):
    model, batch = empty(), make_batch()
    model.load_prompt("own", stored["cached"])
    model.attach_store(stored)
    names = ["own", "rows", "cached"]
    model(**batch, prompts=names).loss.backward()
    tuned(**batch, prompts=["cached", "rows", "cached"]).loss.backward()
    expected = tuned.prompts["cached"].grad  # of rows 0 and 2
    assert (model.prompts["own"].grad - expected).abs().max() > 0
    tuned.zero_grad()
    tuned.load_prompt("other", stored["cached"])
    tuned(**batch, prompts=["other", "rows", "cached"]).loss.backward()
    torch.testing.assert_close(model.prompts["own"].grad, tuned.prompts["other"].grad, rtol=1e-5, atol=1e-6)
    model.load_prompt("rows", stored["cached"])  # hides the stored one
    same(logits(model, batch, "rows"), logits(tuned, batch, "cached"))


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


def test_of_a_stores_prompts_the_last_ones_used_stay(stored, empty, make_batch, monkeypatch):
    reads, read = [], PromptStore.__getitem__
    monkeypatch.setattr(PromptStore, "__getitem__", lambda self, name: reads.append(name) or read(self, name))
    model, batch = empty(), make_batch()
    model.attach_store(stored, keep_bytes=4 * 5 * 32)  # one prompt of rows, beside the batch's
    for name in ("cached", "prepend", "cached", "rows", "cached"):
        logits(model, batch, name)
    assert reads == ["cached", "prepend", "rows"]


def test_threads_share_a_stores_prompts(stored, empty, tuned):
    """While each puts those of the others out of memory."""
    model = empty()
    model.attach_store(stored, keep_bytes=0)
    shared, wrong = model.prompts._stored, []

    def use(name):
        try:
            for _ in range(4000):
                if not torch.equal(shared.prompt(name), tuned.prompts[name]):
                    wrong.append(name)
                shared.trim([name])
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=use, args=(name,)) for name in ("prepend", "cached") * 3]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong


def test_other_prompts_are_there_while_one_is_renamed(tuned):
    wrong, done = [], threading.Event()

    def use():
        try:
            while not done.is_set():
                found = [tuned.prompts.choose(names, 1).names for names in (None, "rows")]
                wrong.extend(names for names in found if names not in (["prepend"], ["rows"]))
        except Exception as error:
            wrong.append(error)

    thread = threading.Thread(target=use)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        thread.start()
        for _ in range(2000):
            tuned.rename_prompt("cached", "other")
            tuned.rename_prompt("other", "cached")
    finally:
        done.set()
        thread.join()
        sys.setswitchinterval(interval)
    assert not wrong


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


def test_kept_keys_go_with_the_prompt_they_are_of(tuned, stored, empty, make_batch, tmp_path):
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
    tuned.prompts["cached"].data += 1.0
    files = {name: file_of(tuned.prompts[name], "cached", None, name) for name in ("cached",)}
    write_store(tmp_path / "other", files)
    model.attach_store(PromptStore(tmp_path / "other"))
    assert model._caches.names == set()
    found = logits(model, batch, "cached")
    model.load_prompt("own", PromptStore(tmp_path / "other")["cached"])
    same(found, logits(model, batch, "own"))
    model.cache_prompts("cached")
    model.attach_store(None)
    assert model._caches.names == set()


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
    assert twin.prompts.choose("rows", 1).prompts[0].tensors()["cross"].dtype == torch.float32
    twin.to("meta")
    assert twin.prompts.choose("rows", 1).prompts[0].tensors()["cross"].device.type == "meta"
    twin.attach_store(None)
    with pytest.raises(ValueError, match=r"there is no prompt\. Add one with"):
        twin.prompts.choose("rows", 1)


def test_a_folder_is_a_store_too(tuned, empty, make_batch, tmp_path):
    for name in ("prepend", "rows"):
        tuned.save_prompt(name, tmp_path / f"{name}.safetensors")
    write_prompt(tmp_path / "narrow.safetensors", PromptFile(torch.zeros(2, 8)))
    model, batch = empty(), make_batch()
    model.attach_store(PromptStore(tmp_path))
    same(logits(model, batch, "rows"), logits(tuned, batch, "rows"))
    with pytest.raises(ValueError, match=r"PromptModel: 'narrow' of .*\[P, 32\].* got \[2, 8\]"):
        logits(model, batch, "narrow")


def test_several_prompts_are_the_tasks_of_one_adapter(tuned, make_model, make_batch, tmp_path):
    peft = pytest.importorskip("peft")
    tuned.add_prompt("other", KINDS["prepend"])
    with torch.no_grad():
        tuned.prompts["other"].mul_(-3.0)
    names = ["prepend", "other"]
    tuned.save_prompt(names, tmp_path, format="peft")
    stock = make_model(num_layers=3, num_decoder_layers=2, d_kv=16, dtype=torch.float64)
    theirs, batch = peft.PeftModel.from_pretrained(stock, tmp_path).eval(), make_batch()
    task_ids = torch.tensor([0, 1, 0], device=batch["input_ids"].device)
    with torch.no_grad():
        found = theirs(**batch, task_ids=task_ids).logits
    same(found, logits(tuned, batch, ["prepend", "other", "prepend"]))
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    how = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(
        theirs.generate(**inputs, task_ids=task_ids, **how),
        tuned.generate(**inputs, prompts=["prepend", "other", "prepend"], **how),
    )
    for task, name in enumerate(names):
        tuned.load_prompt(f"task {task}", tmp_path, task=task)
        assert torch.equal(tuned.prompts[f"task {task}"], tuned.prompts[name])
    for bad, message in (
        (["prepend", "cached"], "one or more 'prepend' prompts .* of one length, got .*'cached'"),
        ([], "one or more 'prepend' prompts"),
    ):
        with pytest.raises(ValueError, match=message):
            tuned.save_prompt(bad, tmp_path / "bad", format="peft")
    with pytest.raises(ValueError, match="tasks of one adapter of format='peft', got 'safetensors'"):
        tuned.save_prompt(names, tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


def test_errors(tuned, stored, make_keyed, make_batch, tmp_path):
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
    tuned.save_prompt("prepend", tmp_path / "folder" / "p.safetensors")
    other.attach_store(PromptStore(tmp_path / "folder"))
    with pytest.raises(ValueError, match=r"'p' of .* belongs to another model"):
        logits(other, batch, "p")

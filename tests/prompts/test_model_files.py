# SPDX-License-Identifier: Apache-2.0
"""save_prompt and load_prompt: a prompt comes back exactly, and only into the model it was trained for."""

import copy
from hashlib import sha256
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from bank import KINDS, logits, same
from torch import nn

from fastprompt.model import PromptModel
from fastprompt.prompts import PromptConfig, PromptFile, identity, read_prompt
from fastprompt.prompts.identity import embedding_sha256


@pytest.fixture
def saved(make_prompted, tmp_path):
    prompted = make_prompted()
    path = tmp_path / "prompt.safetensors"
    prompted.save_prompt("p5", path)
    return prompted, path


def test_a_saved_prompt_gives_the_same_logits(saved, make_model, make_batch):
    prompted, path = saved
    other, batch = PromptModel(make_model(), {}), make_batch()
    other.load_prompt("sst2", path)
    assert torch.equal(other(**batch).logits, prompted(**batch).logits)
    assert other.prompts["sst2"].requires_grad
    other.save_prompt("sst2", path)  # what was loaded can be saved again
    assert other.configs["sst2"] == PromptConfig(5, init="file", source=str(path))


def test_loading_over_a_prompt_keeps_the_parameter(saved, make_prompted, tmp_path):
    prompted, path = saved
    expected = prompted.prompts["p5"].detach().clone()
    parameter = prompted.prompts["p5"]
    nn.init.zeros_(parameter)
    prompted.load_prompt("p5", path)
    assert prompted.prompts["p5"] is parameter
    assert torch.equal(parameter, expected)
    assert prompted.configs["p5"] == PromptConfig(5, init="file", source=str(path))
    longer = make_prompted(lengths=(9,))
    with pytest.raises(
        ValueError, match=r"\[9, 32\]} like prompt 'p9', got .*\[5, 32\]}\. Load it under another"
    ):
        longer.load_prompt("p9", path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_prompt_of_one_dtype_loads_in_another(dtype, saved, make_model):
    _, path = saved
    PromptModel(make_model(dtype=dtype), {}).load_prompt("p", path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.shared.weight.data[3].mul_(2), "embedding table [0-9a-f]{12}, not [0-9a-f]{12}"),
        (lambda m: m.resize_token_embeddings(70), "vocab_size 64, not 70"),
        (lambda m: setattr(m.config, "model_type", "mt5"), "model_type 't5', not 'mt5'"),
    ],
)
def test_a_prompt_of_another_model_is_refused_unless_asked_for(change, message, saved, make_model):
    _, path = saved
    model = make_model()
    change(model)
    prompted = PromptModel(model, {})
    with pytest.raises(
        ValueError, match=f"prompt.safetensors belongs to another model .*{message}.*strict=False"
    ):
        prompted.load_prompt("p", path)
    assert "p" not in prompted.prompts
    prompted.load_prompt("p", path, strict=False)
    assert len(prompted.prompts["p"]) == 5


def test_another_width_is_refused_even_unstrictly(saved, make_model):
    _, path = saved
    with pytest.raises(ValueError, match=r"\[P, 16\].*got \[5, 32\]. A prompt fits only"):
        PromptModel(make_model(d_model=16), {}).load_prompt("p", path, strict=False)


@pytest.mark.parametrize("saved_in", [torch.float32, torch.float16])
@pytest.mark.parametrize("loaded_in", [torch.float32, torch.float16])
def test_float32_and_float16_loads_of_one_model_know_each_other(saved_in, loaded_in, make_model, tmp_path):
    """Rounded to float16 and then to bfloat16 a table is another than rounded once."""
    path = tmp_path / "prompt"
    PromptModel(make_model(dtype=saved_in), PromptConfig(3)).save_prompt("default", path)
    PromptModel(make_model(dtype=loaded_in), {}).load_prompt("p", path)
    other = make_model()
    other.shared.weight.data[3] *= 2
    with pytest.raises(ValueError, match="belongs to another model"):
        PromptModel(other.to(loaded_in), {}).load_prompt("p", path)


def test_files_of_other_projects_load_by_width_alone(make_model, tmp_path):
    np.save(tmp_path / "prompt.npy", np.ones((4, 32), np.float32))
    prompted = PromptModel(make_model(), {})
    prompted.load_prompt("p", tmp_path / "prompt.npy")
    assert prompted.prompts["p"].eq(1).all()


def test_the_hash_sees_every_row_and_the_shape():
    table = torch.randn(9000, 600)  # several chunks
    first = embedding_sha256(table)
    assert embedding_sha256(table.clone()) == first == embedding_sha256(table.T.contiguous().T)
    assert embedding_sha256(table.bfloat16()) == first
    assert embedding_sha256(table.view(4500, 1200)) != first
    for row in (0, 4500, 8999):
        changed = table.clone()
        changed[row, 0] += 1
        assert embedding_sha256(changed) != first


def test_a_table_is_hashed_anew_once_any_of_it_has_changed(monkeypatch):
    """Through .data, too, which leaves no other trace."""
    hashed, known = [], []
    monkeypatch.setattr(identity, "_KNOWN", 99)
    monkeypatch.setattr(identity, "hashlib", SimpleNamespace(sha256=lambda x: hashed.append(x) or sha256(x)))
    table = torch.randn(50, 8)
    for change in (
        lambda data: data,
        lambda data: data[3, 2].mul_(2) and data,
        lambda data: data[1, 1].neg_() and data,  # the uppermost bit of a word
        lambda data: data[1, 3::2].neg_().any() and data,
        lambda data: data[:, 1::2].neg_().any() and data,
        lambda data: data.copy_(data.roll(1, 0)),  # the same numbers in another order
        lambda data: data.copy_(data.roll(2, 1)),
        lambda data: data.half(),
        lambda data: data.view(torch.bfloat16),  # the same bits
        lambda data: data.zero_(),
        lambda data: data.view(25, 16),
        lambda data: data[:, :7].clone(),  # an odd width
        lambda data: data.add_(1),
        lambda data: torch.randn(401)[1:].view(50, 8),  # at an odd place of a storage
    ):
        table.data = change(table.data)
        fresh = []
        for dtype in (None, torch.float16):
            monkeypatch.setattr(identity, "_known", [])
            fresh.append(embedding_sha256(table, dtype))
        monkeypatch.setattr(identity, "_known", known)
        hashed.clear()
        for _ in range(3):
            assert [embedding_sha256(table, dtype) for dtype in (None, torch.float16)] == fresh
        assert len(hashed) <= 2 or table.shape[1] % 2 or table.storage_offset() % 2


def test_tables_of_one_sum_are_told_apart():
    table = torch.randn(50, 8)
    other = table[:, [2, 3, 0, 1, 4, 5, 6, 7]]
    assert embedding_sha256(table) != embedding_sha256(other) == embedding_sha256(other.double())


def test_a_name_is_checked_before_a_file_is_written(make_prompted, tmp_path):
    with pytest.raises(ValueError, match=r"no prompt 'p6'; there are \['p5'\]"):
        make_prompted().save_prompt("p6", tmp_path / "prompt")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", KINDS)
def test_a_saved_prompt_of_any_kind_gives_the_same_logits(name, bank, empty, make_batch, tmp_path):
    bank.save_prompt(name, tmp_path / "prompt")
    other, batch = empty(), make_batch()
    other.load_prompt("p", tmp_path / "prompt")
    same(logits(other, batch, "p"), logits(bank, batch, name))
    assert other.kind("p") == bank.kind(name)
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


def test_how_a_prompt_began_is_not_forgotten(bank, empty, tmp_path):
    bank.add_prompt("zeros", PromptConfig(3, init="zeros"))
    bank.save_prompt("zeros", tmp_path / "first")
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
def test_loading_over_a_prompt_keeps_its_parameters(name, bank, make_batch, tmp_path):
    bank.save_prompt(name, tmp_path / "prompt")
    batch = make_batch()
    before, parameters = logits(bank, batch, name), dict(bank.prompts.named_parameters())
    bank.eval()
    if bank.kind(name) != "prepend":
        bank.cache_prompts(name)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(1)
    assert not torch.equal(logits(bank, batch, name), before)
    bank.load_prompt(name, tmp_path / "prompt")
    same(logits(bank, batch, name), before)
    assert all(each is parameters[key] for key, each in bank.prompts.named_parameters())


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
def test_loading_over_another_kind_of_prompt_is_refused(name, other, message, bank, tmp_path):
    bank.save_prompt(name, tmp_path / "prompt")
    before, configs = copy.deepcopy(bank.state_dict()), dict(bank.configs)
    with pytest.raises(ValueError, match=f"{message}.*Load it under another name, or begin a prompt from it"):
        bank.load_prompt(other, tmp_path / "prompt")
    assert all(torch.equal(tensor, before[key]) for key, tensor in bank.state_dict().items())
    assert bank.configs == configs


def test_a_prefix_of_another_model_is_refused(bank, make_keyed, tmp_path):
    bank.save_prompt("rows", tmp_path / "prompt")
    deeper = make_keyed({}, num_layers=4, num_decoder_layers=2)
    with pytest.raises(ValueError, match=r"tensor 'encoder' must have shape .*=\[4, 3, 32\], as the model"):
        deeper.load_prompt("p", tmp_path / "prompt", strict=False)
    assert "p" not in deeper.prompts


@pytest.mark.parametrize("name", ["cached", "rows"])
def test_a_loaded_prompt_has_memory_of_its_own(name, bank, empty):
    tuned, other = empty(), empty()
    file = PromptFile(
        bank.prompts[name].tensors() if name == "rows" else bank.prompts[name],
        bank.kind(name),
        parameterization="rows" if name == "rows" else None,
    )
    tuned.load_prompt("x", file, strict=False)
    other.load_prompt("x", file, strict=False)
    expected = [each.clone() for each in other.prompts.parameters()]
    with torch.no_grad():
        for each in tuned.prompts.parameters():
            each.add_(1.0)
    assert all(map(torch.equal, other.prompts.parameters(), expected))


def test_few_tables_are_remembered():
    for _ in range(3 * identity._KNOWN):
        embedding_sha256(torch.randn(4, 8))
        assert len(identity._known) <= identity._KNOWN

# SPDX-License-Identifier: Apache-2.0
"""The initialisers against their definition: Lester et al. 2021 section 3.2, and the code released with it."""

import warnings

import numpy as np
import pytest
import torch
from transformers import ByT5Tokenizer

from fastprompt.model import PromptModel
from fastprompt.prompts import PromptConfig, initial_prompt

V, D = 64, 8


@pytest.fixture
def weight(device):
    return torch.randn(V, D, generator=torch.Generator().manual_seed(5)).to(device)


def rows_of(prompt, weight):
    """The token id of each prompt row."""
    same = (prompt[:, None] == weight.float().cpu()[None]).all(-1)
    assert same.any(1).all(), "a row that is no embedding"
    return same.int().argmax(1)


@pytest.mark.parametrize(("init", "low", "high"), [("uniform", -0.5, 0.5), ("uniform_positive", 0.0, 0.5)])
def test_uniform_fills_its_interval(init, low, high):
    prompt = initial_prompt(PromptConfig(100, init=init), torch.empty(V, 512, device="meta"))
    assert prompt.shape == (100, 512)
    assert low <= prompt.min() < low + 0.01
    assert high - 0.01 < prompt.max() < high
    assert abs(prompt.mean() - (low + high) / 2) < 0.01
    assert abs(prompt.var() - (high - low) ** 2 / 12) < 0.01


def test_vocab_draws_distinct_rows_of_the_table(weight):
    ids = rows_of(initial_prompt(PromptConfig(V), weight), weight)
    assert sorted(ids.tolist()) == list(range(V))
    assert ids.tolist() != list(range(V))


def test_vocab_draws_from_the_first_5000_ids():
    ids = torch.arange(32128.0)[:, None]
    drawn = initial_prompt(PromptConfig(4000), ids)
    assert drawn.max() < 5000
    assert len(drawn.unique()) == 4000
    assert drawn.max() > 4900


def test_vocab_longer_than_the_population_draws_again(weight):
    with pytest.warns(UserWarning, match=f"num_tokens=100 exceeds the {V} token ids"):
        prompt = initial_prompt(PromptConfig(100), weight)
    assert len(rows_of(prompt, weight).unique()) < V


@pytest.mark.parametrize("init", ["uniform", "uniform_positive", "vocab"])
def test_the_seed_decides_and_the_global_generator_is_left_alone(init, weight):
    state = torch.get_rng_state()
    first, again, other = (initial_prompt(PromptConfig(9, init=init, seed=s), weight) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)
    with torch.device("meta"):
        assert torch.equal(initial_prompt(PromptConfig(9, init=init, seed=1), weight), first)


@pytest.mark.parametrize("init", ["uniform", "uniform_positive", "zeros", "vocab"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_what_others_make_by_default_is_not_asked(dtype, init, weight):
    expected = initial_prompt(PromptConfig(9, init=init), weight)
    torch.set_default_dtype(dtype)
    try:
        found = initial_prompt(PromptConfig(9, init=init), weight)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_rows_are_fp32_on_the_cpu_whatever_the_table(dtype, weight):
    prompt = initial_prompt(PromptConfig(9), weight.to(dtype))
    assert prompt.dtype == torch.float32
    assert prompt.device.type == "cpu"
    rows_of(prompt, weight.to(dtype))


def test_labels_are_means_of_their_pieces_and_vocab_fills_the_rest(weight, tokenizer):
    config = PromptConfig(6, init="labels", labels=["w7", "w8 w9 w20"], seed=4)
    prompt, table = initial_prompt(config, weight, tokenizer), weight.cpu()
    torch.testing.assert_close(prompt[0], table[7])
    torch.testing.assert_close(prompt[1], (table[8] + table[9] + table[20]) / 3)
    assert torch.equal(prompt[2:], initial_prompt(PromptConfig(6, seed=4), weight)[2:])


def test_labels_beyond_the_prompt_are_dropped_with_a_warning(weight, tokenizer):
    config = PromptConfig(2, init="labels", labels=["w7", "w8", "w9"])
    with pytest.warns(UserWarning, match="3 labels for num_tokens=2; those from 'w9' on"):
        prompt = initial_prompt(config, weight, tokenizer)
    assert rows_of(prompt, weight).tolist() == [7, 8]


def test_a_warning_is_at_the_users_line(make_model, tokenizer):
    config = PromptConfig(2, init="labels", labels=["w7", "w8", "w9"])
    with pytest.warns(UserWarning, match="3 labels") as told:
        PromptModel(make_model(), config, tokenizer=tokenizer)
    assert told[0].filename == __file__


def test_text_is_one_piece_per_row(weight, tokenizer):
    config = PromptConfig(5, init="text", text="w7 w8 w7", seed=4)
    prompt = initial_prompt(config, weight, tokenizer)
    assert rows_of(prompt, weight)[:3].tolist() == [7, 8, 7]
    assert torch.equal(prompt[3:], initial_prompt(PromptConfig(5, seed=4), weight)[3:])
    with pytest.warns(UserWarning, match="3 pieces of text for num_tokens=2"):
        short = initial_prompt(PromptConfig(2, init="text", text="w7 w8 w7"), weight, tokenizer)
    assert rows_of(short, weight).tolist() == [7, 8]


def test_pieces_of_a_real_tokenizer_have_no_eos():
    weight = torch.arange(384.0)[:, None]
    prompt = initial_prompt(PromptConfig(4, init="labels", labels=["ab", "c"]), weight, ByT5Tokenizer())
    assert prompt[:2, 0].tolist() == [(100 + 101) / 2, 102]  # a byte's id is the byte + 3


@pytest.mark.parametrize("make", [np.asarray, torch.tensor, list])
def test_array_is_copied(make, weight):
    values = np.random.default_rng(0).normal(size=(3, D)).astype(np.float32)
    source = make(values.tolist())
    prompt = initial_prompt(PromptConfig(3, init="array", source=source), weight)
    assert torch.equal(prompt, torch.from_numpy(values))
    prompt.zero_()
    assert float(source[0][0]) == pytest.approx(float(values[0, 0]))


def test_file_is_read_and_must_have_the_rows(weight, tmp_path):
    values = np.ones((3, D), np.float32)
    np.save(tmp_path / "prompt.npy", values)
    config = {"init": "file", "source": tmp_path / "prompt.npy"}
    assert initial_prompt(PromptConfig(3, **config), weight).eq(1).all()
    with pytest.raises(ValueError, match=r"must have num_tokens=4 rows, got 3. Pass num_tokens=3"):
        initial_prompt(PromptConfig(4, **config), weight)


def test_refusals(weight, tokenizer):
    def refused(match, table=weight, words=tokenizer, error=ValueError, **arguments):
        with pytest.raises(error, match=match), warnings.catch_warnings():
            initial_prompt(PromptConfig(3, **arguments), table, words)

    refused("needs a tokenizer", words=None, init="labels", labels=["w7"])
    refused("does not know 'w7 maybe'", init="labels", labels=["w7 maybe"])
    refused("does not know 'perhaps'", init="text", text="perhaps")
    refused("token id 63, the embedding table 60 rows", table=weight[:60], init="text", text="w63")
    refused("no data", table=torch.empty(V, D, device="meta"), init="vocab")
    refused(r"must have shape \[P, D\]=\[3, 8\]", init="array", source=np.zeros((3, 9)))
    refused("NaN or infinity in 1 of its 3 rows", init="array", source=[[0.0] * D, [np.nan] * D, [1.0] * D])
    refused("must hold floats", error=TypeError, init="array", source=np.zeros((3, D), np.int64))
    refused("must hold floats", error=TypeError, init="array", source=torch.zeros(3, D, dtype=torch.int64))
    refused("must hold floats", error=TypeError, init="array", source=[["a"] * D] * 3)

# SPDX-License-Identifier: Apache-2.0
"""The shipped model: small, safe to load, and better than chance on text that it has not seen."""

import json
import math

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from fastprompt.demo.run import TINY_T5
from fastprompt.training.batches import collate


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY_T5)


@pytest.fixture(scope="module")
def model():
    return AutoModelForSeq2SeqLM.from_pretrained(TINY_T5, dtype=torch.float32).eval()


def test_the_folder_is_small_and_has_no_pickle():
    files = [path for path in TINY_T5.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 8_000_000
    assert {path.suffix for path in files} == {".json", ".safetensors", ".md"}


def test_the_tokenizer_is_t5_like(tokenizer, model):
    assert [tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id] == [0, 1, 2]
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.convert_tokens_to_ids("<extra_id_0>") == len(tokenizer) - 1
    assert tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id


def test_the_tokenizer_round_trips_plain_english(tokenizer):
    text = "Return the socket's file descriptor, or raise an error if 2 files are open."
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_the_config_is_a_plain_t5(model):
    config = json.loads((TINY_T5 / "config.json").read_text())
    assert config["model_type"] == "t5"
    assert config["architectures"] == ["T5ForConditionalGeneration"]


def test_it_continues_held_out_text_far_better_than_chance(tokenizer, model, splits):
    texts = [example.text for example in splits["test"]]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    pairs = [([*row[:32], tokenizer.eos_token_id], row[32:64]) for row in ids if len(row) >= 64][:64]
    with torch.no_grad():
        loss = model(**collate(pairs)).loss.item()
    assert loss < math.log(len(tokenizer)) - 2

# SPDX-License-Identifier: Apache-2.0
"""The tiny T5 of the demo, and examples that a prompt can learn by heart."""

import json
from functools import partial

import pytest
import torch
from command_line import MODEL
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from fastprompt import PromptConfig, PromptModel
from fastprompt.demo.run import TINY_T5
from fastprompt.training import Example

CHOICES = ["files", "network", "graphics"]


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY_T5)


@pytest.fixture
def model():
    return AutoModelForSeq2SeqLM.from_pretrained(TINY_T5, dtype=torch.float32).eval()


@pytest.fixture
def prompted(model, tokenizer):
    config = PromptConfig(8, init="labels", labels=CHOICES)
    return PromptModel(model, {"one": config, "two": PromptConfig(3)}, tokenizer=tokenizer)


@pytest.fixture
def choices():
    return CHOICES


@pytest.fixture
def examples():
    texts = ["open a file", "send a request to a host", "draw a line", "remove a folder", "listen on a port"]
    return [Example(text, CHOICES[number % 3]) for number, text in enumerate(texts)]


@pytest.fixture
def files(tmp_path, examples, choices):
    """Paths, and arguments that all commands on these examples share."""
    data = tmp_path / "data.jsonl"
    data.write_text(
        "".join(json.dumps({"text": each.input, "area": each.target}) + "\n" for each in examples)
    )
    fields = ["--input-field", "text", "--target-field", "area"]
    return data, tmp_path / "new" / "p.safetensors", [*MODEL, *fields, "--choices", *choices]


@pytest.fixture
def spied(monkeypatch):
    """What functions, each of a module by its name, are called with: [(arguments, options), ...] by name."""

    def spied(*functions):
        seen = {}

        def spy(name, function, *arguments, **options):
            seen.setdefault(name, []).append((arguments, options))
            return function(*arguments, **options)

        for module, name in functions:
            monkeypatch.setattr(module, name, partial(spy, name, getattr(module, name)))
        return seen

    return spied

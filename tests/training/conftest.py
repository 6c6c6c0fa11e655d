# SPDX-License-Identifier: Apache-2.0
"""The tiny T5 of the demo, and examples that a prompt can learn by heart."""

import pytest
import torch
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

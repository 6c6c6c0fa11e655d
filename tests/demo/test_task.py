# SPDX-License-Identifier: Apache-2.0
"""The classification task: nothing of dev or test may be seen in training, nor in pretraining."""

import hashlib
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from fastprompt.demo import task


@pytest.fixture(scope="module")
def pretraining(from_documents):
    return from_documents(task.pretraining_documents)


def runs(text, words=8):
    split = text.lower().split()
    return {tuple(split[i : i + words]) for i in range(len(split) - words + 1)}


def test_no_module_is_in_two_splits(splits):
    modules = [{example.module for example in examples} for examples in splits.values()]
    assert sum(map(len, modules)) == len(set().union(*modules))


def test_every_area_is_in_every_split_and_none_dominates(splits):
    for split, examples in splits.items():
        counts = Counter(example.label for example in examples)
        assert list(counts) == list(task.AREAS)
        assert min(counts.values()) >= 8
        assert max(counts.values()) <= task.CAPS[split]
        assert max(counts.values()) / len(examples) < 0.25


def test_a_training_text_shares_no_eight_words_with_a_held_out_one(splits):
    held_out = set().union(*(runs(example.text) for split in ("dev", "test") for example in splits[split]))
    assert all(held_out.isdisjoint(runs(example.text)) for example in splits["train"])


def test_texts_are_single_lines_long_enough_to_mean_something(splits):
    for examples in splits.values():
        assert all(len(example.text.split()) >= task.MIN_WORDS for example in examples)
        assert all("\n" not in example.text for example in examples)
        assert len({example.text for example in examples}) == len(examples)


def test_nothing_held_out_is_in_the_pretraining_text(pretraining, documents):
    held_out = [document for document in documents if task.split_of(document.module) != "train"]
    assert len(held_out) > 500
    assert {task.split_of(document.module) for document in pretraining} == {"train"}
    forbidden = set().union(*(runs(document.text) for document in held_out))
    assert all(forbidden.isdisjoint(runs(document.text)) for document in pretraining)


def test_pretraining_reads_the_language_reference(pretraining):
    assert any(document.module == "pydoc_data.topics" for document in pretraining)


def test_a_module_has_one_area_and_every_held_out_module_has_one():
    packages = [package for packages in task.AREAS.values() for package in packages]
    assert len(packages) == len(set(packages))
    held_out = [name for names in task.HELD_OUT.values() for name in names]
    assert len(held_out) == len(set(held_out))
    assert {name.partition(".")[0] for name in held_out} <= set(packages)


def test_submodules_follow_their_package():
    assert task.split_of("email.mime.text") == "test"
    assert task.split_of("email.message") == "train"
    assert task.split_of("queue") == "dev"
    assert task.split_of("queues") == "train"


IN_ANOTHER_PROCESS = """
import hashlib, sys, types
sys.modules["demo"] = package = types.ModuleType("demo")  # without what the rest of it imports
package.__path__ = [sys.argv[1]]
from demo.task import load_task
print({split: hashlib.sha256(repr(examples).encode()).hexdigest() for split, examples in load_task().items()})
"""


def test_deterministic(splits):
    """Another process, whose sets have another order, reads the same in the same order."""
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    command = [sys.executable, "-c", IN_ANOTHER_PROCESS, str(Path(task.__file__).parent)]
    environment = os.environ | {"PYTHONHASHSEED": seed}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    digests = {
        split: hashlib.sha256(repr(examples).encode()).hexdigest() for split, examples in splits.items()
    }
    assert run.stdout.strip() == str(digests)

# SPDX-License-Identifier: Apache-2.0
"""Examples in files, and as batches."""

import csv
import itertools
from types import SimpleNamespace

import pytest
import torch

from fastprompt.training import Example, collate, in_order, read_examples, shuffled
from fastprompt.training.batches import lengths_over

PAIRS = [([5, 6, 7, 1], [8, 1]), ([9, 1], [10, 11, 1]), ([12, 13, 1], [8, 1])]


def written(tmp_path, text, name="examples.jsonl"):
    path = tmp_path / name
    path.write_bytes(text.encode())
    return path


def test_json_lines(tmp_path):
    path = written(
        tmp_path,
        '\ufeff{"input": "é a", "target": "b"}\r\n\n{"more": {"input": 1, "input": 2}, "input": 1.50, "target": 3}\n'
        '{"more": 1, "more": 2, "input": NaN, "target": -Infinity}\n',
    )
    assert read_examples(path) == [Example("é a", "b"), Example("1.50", "3"), Example("NaN", "-Infinity")]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("e.csv", 'label,text\npositive,"a, ""b""\r\nc"\n1.50,d\n', ['a, "b"\r\nc', "d"]),
        ("e.csv", "label,text,,\npositive,a,,\n1.50,b,,\n", ["a", "b"]),  # as spreadsheets write it
        ("e.TSV", 'label\ttext\npositive\t"a, b\n1.50\t"c" d\n', ['"a, b', '"c" d']),
    ],
)
def test_tables(tmp_path, name, text, expected):
    examples = read_examples(written(tmp_path, text, name), input_field="text", target_field="label")
    assert [each.input for each in examples] == expected
    assert [each.target for each in examples] == ["positive", "1.50"]


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("", "e.jsonl", "holds no example"),
        ("input,target\n", "e.csv", "holds no example"),
        ('{"input": "a", "target": "b"}\n{"input": ', "e.jsonl", "line 2: is no JSON"),
        ("[1]", "e.jsonl", "line 1: must be a JSON object, got list"),
        (
            '{"input": "a", "label": "b"}',
            "e.jsonl",
            r"line 1: must have a field 'target', got \['input', 'label'\]. Name its fields with input_field",
        ),
        ('{"input": "a", "target": true}', "e.jsonl", "'target' must be a text or a number, got True"),
        (
            '{"target": "a", "input": "b", "target": "c"}',
            "e.jsonl",
            r"line 1: must name .* once, got \['target', ",
        ),
        ("input,target\na, b,positive\n", "e.csv", "line 2: has more fields than the 2 names"),
        ('input,target\n"a,b\n', "e.csv", "behind line 1: unexpected end of data"),
        ('{"input": "\\ud800", "target": "b"}', "e.jsonl", r"line 1: 'input' is no text: '\\ud800'"),
        ("[" * 100_000, "e.jsonl", "line 1: is no JSON: maximum recursion depth"),
        ("\ninput,target\na,b\n", "e.csv", r"first line must name the fields, .* got \[\]"),
        ("input,target,input\na,b,c\n", "e.csv", "first line must name the fields, .*once"),
        ("input,target\na\n", "e.csv", "line 2: 'target' must be a text or a number, got None"),
    ],
)
def test_files_that_hold_something_else(tmp_path, text, name, message):
    with pytest.raises(ValueError, match=message):
        read_examples(written(tmp_path, text, name))


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
@pytest.mark.parametrize("name", ["e.jsonl", "e.csv"])
def test_another_encoding_is_named(tmp_path, encoding, name):
    path = tmp_path / name
    path.write_bytes('input,target\né,b\n{"input": "é"}\n'.encode(encoding))
    with pytest.raises(ValueError, match=f"{name}: is no UTF-8"):
        read_examples(path)


def test_a_table_may_hold_long_documents(tmp_path):
    """And the process's own limit is what it was, also while an error is looked at."""
    before = csv.field_size_limit(5_000)
    try:
        [example] = read_examples(written(tmp_path, f"input,target\n{'a' * 200_000},b\n", "e.csv"))
        assert len(example.input) == 200_000
        assert csv.field_size_limit() == 5_000
        with pytest.raises(ValueError, match="must have a field 'target'") as error:
            read_examples(written(tmp_path, "input,other\na,b\n", "e.csv"))
        assert csv.field_size_limit() == 5_000, error
    finally:
        csv.field_size_limit(before)


def test_batches_pad_and_shuffle():
    batch = collate(PAIRS)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 1], [9, 1, 0, 0], [12, 13, 1, 0]]
    assert batch["attention_mask"].sum(1).tolist() == [4, 2, 3]
    assert batch["labels"].tolist() == [[8, 1, -100], [10, 11, 1], [8, 1, -100]]
    first, again = shuffled(PAIRS, 2, seed=3), shuffled(PAIRS, 2, seed=3)
    assert all(torch.equal(next(first)["input_ids"], next(again)["input_ids"]) for _ in range(5))


def test_an_epoch_has_every_example_once():
    batches = shuffled(PAIRS * 2, 3, seed=0)
    for _ in range(3):
        epoch = torch.cat([next(batches)["input_ids"][:, 0] for _ in range(2)])
        assert sorted(epoch.tolist()) == [5, 5, 9, 9, 12, 12]


def test_the_seed_and_the_epoch_make_the_order():
    def orders(seed):
        batches = shuffled([([number], [1]) for number in range(20)], 20, seed)
        return [next(batches)["input_ids"][:, 0].tolist() for _ in range(3)]

    seen = [tuple(order) for seed in (0, 1) for order in orders(seed)]
    assert len(set(seen)) == 6


def test_every_batch_is_full():
    assert [len(batch["labels"]) for batch in itertools.islice(shuffled(PAIRS, 2, seed=0), 4)] == [2] * 4


def test_few_examples_are_one_batch():
    assert len(next(shuffled(PAIRS, 32, seed=0))["labels"]) == 3
    assert [len(batch["labels"]) for batch in in_order(PAIRS, 2)] == [2, 1]


def test_batches_of_no_size_are_refused():
    with pytest.raises(ValueError, match="in_order: batch_size must be 1 or more, got -1"):
        in_order(PAIRS, -1)


@pytest.mark.parametrize(("pairs", "size"), [([], 32), (PAIRS, 0)])
def test_no_batch_at_all_is_refused(pairs, size):
    with pytest.raises(ValueError, match="needs an example and a batch_size of 1 or more"):
        shuffled(pairs, size, seed=0)


def test_a_target_without_an_end_marker_has_all_its_tokens():
    tokenizer = SimpleNamespace(eos_token_id=1)
    assert lengths_over([[5, 6], [5, 1], []], tokenizer, 1) == [2]

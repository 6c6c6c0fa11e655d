# SPDX-License-Identifier: Apache-2.0
"""PromptStore: what was written is read back, nothing else is read, and broken or hostile files are only refused."""

import copy
import json
import os
import pickle
import struct
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fastprompt.prompts import PromptFile, write_prompt
from fastprompt.prompts.identity import ModelIdentity
from fastprompt.prompts.store import PromptStore, write_store

P, D = 5, 32


def rows(seed, length=P):
    return torch.randn(length, D, generator=torch.Generator().manual_seed(seed)) * 1000


def prefix(parameterization):
    if parameterization == "rows":
        tensors = {"encoder": torch.randn(3, P, D), "cross": torch.randn(2, P, D)}
    else:
        tensors = {f"decoder_{part}": torch.randn(2, P, 4, 12) for part in "kv"}
    return PromptFile(tensors, "prefix", parameterization=parameterization)


PROMPTS = {
    "sst2": PromptFile(rows(0)),
    "a longer one": PromptFile(rows(1, 9)),
    "glue.rte": PromptFile(rows(2), "cached"),
    "rows": prefix("rows"),
    "KV": prefix("kv"),
    "Привет": PromptFile(rows(3)),
}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "new" / "prompts.store"
    write_store(path, PROMPTS)
    return path


@pytest.mark.parametrize("name", PROMPTS)
def test_a_prompt_comes_back(name, path):
    store = PromptStore(path)
    assert list(store) == list(PROMPTS)
    assert (len(store), name in store, "other" in store) == (6, True, False)
    again, expected = store[name], PROMPTS[name]
    assert (again.kind, again.parameterization, again.name) == (
        expected.kind,
        expected.parameterization,
        name,
    )
    assert again.tensors.keys() == expected.tensors.keys()
    assert all(torch.equal(again.tensors[key], tensor) for key, tensor in expected.tensors.items())
    assert store[name].tensors.keys() == expected.tensors.keys()  # a second time
    with pytest.raises(KeyError, match="there is no prompt 'other'"):
        store["other"]


def test_other_programs_read_it_as_safetensors(path):
    tensors = load_file(path)
    assert torch.equal(tensors["prepend/sst2/prompt"], PROMPTS["sst2"].rows)
    assert torch.equal(tensors["prefix.kv/KV/decoder_v"], PROMPTS["KV"].tensors["decoder_v"])


def test_the_header_may_have_another_order_than_the_data(tmp_path):
    """JSON's objects have none."""
    entries = {B: entry(begin=16), A: entry()}
    (tmp_path / "x").write_bytes(store_file(header(**entries), ONE + struct.pack("<4f", 5, 6, 7, 8)))
    store = PromptStore(tmp_path / "x")
    assert store["a"].rows.tolist() == [[1, 2], [3, 4]]
    assert store["b"].rows.tolist() == [[5, 6], [7, 8]]


def test_a_folder_of_prompt_files_is_a_store(tmp_path):
    for name, prompt in PROMPTS.items():
        write_prompt(tmp_path / f"{name}.safetensors", prompt)
    (tmp_path / "sst2.cache.safetensors").write_bytes(b"a cache is no prompt")
    (tmp_path / "notes.txt").touch()
    (tmp_path / ".half-written.safetensors").touch()
    store = PromptStore(tmp_path)
    assert sorted(store) == sorted(PROMPTS)
    assert torch.equal(store["glue.rte"].rows, PROMPTS["glue.rte"].rows)
    assert (store["glue.rte"].kind, len(store)) == ("cached", 6)
    with pytest.raises(KeyError, match=r"no prompt '\.\./sst2'"):
        store["../sst2"]


def test_a_store_can_be_written_from_a_store_and_from_a_generator(path, tmp_path):
    write_store(tmp_path / "again", PromptStore(path))
    assert (tmp_path / "again").read_bytes() == path.read_bytes()
    write_store(tmp_path / "pairs", ((name, PROMPTS[name]) for name in PROMPTS))
    assert (tmp_path / "pairs").read_bytes() == path.read_bytes()
    write_store(path, ((name, prompt) for name, prompt in PromptStore(path).items()))  # over itself
    assert (tmp_path / "again").read_bytes() == path.read_bytes()
    write_store(path, {})
    assert list(PromptStore(path)) == []


def test_a_closed_store_says_so(path):
    with PromptStore(path) as store:
        assert store["sst2"]
    with pytest.raises(ValueError, match=r"prompts\.store is closed, and 'sst2' has to be read from it"):
        store["sst2"]


def test_a_system_that_cannot_read_at_a_place(path, monkeypatch):
    """Windows, for one. Folders are read there, too."""
    monkeypatch.delattr(os, "preadv")
    with pytest.raises(OSError, match=r"prompts\.store is one file, .*Use a folder"):
        PromptStore(path)
    with pytest.raises(FileNotFoundError):
        PromptStore(path.with_name("nowhere"))
    assert list(PromptStore(path.parent)) == []


def test_copies_pickles_and_threads(path):
    store = PromptStore(path)
    for other in (copy.deepcopy(store), pickle.loads(pickle.dumps(store))):
        store.close()
        assert torch.equal(other["sst2"].rows, PROMPTS["sst2"].rows)
        store = other
    wrong = []

    def read():
        wrong.extend(name for name in PROMPTS for _ in range(50) if not _same(store[name], PROMPTS[name]))

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def _same(one, other):
    return all(torch.equal(one.tensors[key], tensor) for key, tensor in other.tensors.items())


def test_the_models_identity_is_one_for_all(path, tmp_path):
    model = ModelIdentity("google/t5", "t5", 64, D, "float32", "0" * 64)
    other = ModelIdentity("google/t5", "t5", 64, D, "float32", "1" * 64)
    assert PromptStore(path).model is None
    write_store(path, {"a": PromptFile(rows(0), model=model), "b": PromptFile(rows(1))})
    assert PromptStore(path).model == PromptStore(path)["b"].model == model
    write_store(path, {"a": PromptFile(rows(0))}, model=other)
    assert PromptStore(path).model == other
    with pytest.raises(
        ValueError, match="'b' belongs to another model than those before it: embedding table"
    ):
        write_store(
            tmp_path / "x", {"a": PromptFile(rows(0), model=model), "b": PromptFile(rows(1), model=other)}
        )


BAD_NAMES = ["", ".", "..", ".hidden", "a/b", "../a", "a\\b", "a\nb", "a\0b", "x" * 201, 5, None]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_hostile_names_are_not_written(name, tmp_path):
    with pytest.raises(ValueError, match="write_store: a prompt's name must be a str of 1 to 200 printable"):
        write_store(tmp_path / "store", [(name, PromptFile(rows(0)))])
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("pairs", "error", "message"),
    [
        ([("a", PromptFile(rows(0))), ("a", PromptFile(rows(1)))], ValueError, "there are two prompts 'a'"),
        (
            [("a", PromptFile(rows(0))), ("b", PromptFile(rows(0) / 0))],
            ValueError,
            "'b': tensor 'prompt' has NaN",
        ),
        (
            [("a", PromptFile(torch.ones(2, 2, dtype=torch.int64)))],
            TypeError,
            "'a': tensor 'prompt' must hold floats",
        ),
        ([("a", PromptFile(torch.ones(2, 2, 2)))], ValueError, r"must have shape \[P, D\]"),
        (
            [("a", PromptFile({"x": rows(0)}, "prefix", parameterization="kv"))],
            ValueError,
            "'a' must hold tensors",
        ),
    ],
)
def test_what_is_no_prompt_is_not_written(pairs, error, message, path):
    before = path.read_bytes()
    with pytest.raises(error, match=f"write_store: .*{message}"):
        write_store(path, pairs)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def store_file(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


META = {"format": "fastprompt.store", "version": "1"}
ONE = struct.pack("<4f", 1, 2, 3, 4)


def header(metadata=META, **tensors):
    return {"__metadata__": metadata} | tensors


def entry(shape=(2, 2), begin=0, end=None, dtype="F32"):
    end = begin + 4 * int(np.prod(shape)) if end is None else end
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


A, B = "prepend/a/prompt", "prepend/b/prompt"
TWICE = b'{"__metadata__":{"format":"fastprompt.store","version":"1"},"x":1,"x":2}'
HOSTILE = {
    "empty": (b"", "is no store, or is cut short"),
    "header_length": (
        struct.pack("<Q", 2**60) + b"{}",
        r"must have 2 to 16777216 bytes within the file's 10, got",
    ),
    "header_cut": (store_file(header(**{A: entry()}))[:40], "is no store, or is cut short"),
    "text": (struct.pack("<Q", 9) + b"some text", "no readable header"),
    "list": (store_file([1, 2]), "is no store. One prompt's file is read by"),
    "deep": (store_file(b'{"a":' * 100_000), "no readable header"),
    "digits": (store_file(b'{"a":' + b"9" * 100_000 + b"}"), "no readable header"),
    "twice": (store_file(TWICE), "the key 'x' is there twice"),
    "prompt": (
        store_file(header({"format": "fastprompt.prompt"})),
        "is no store. One prompt's file is read by",
    ),
    "metadata": (store_file(header([1])), "is no store"),
    "newer": (
        store_file(header(META | {"version": "2"})),
        "must have version 1, got '2'. It may come from a newer",
    ),
    "model": (store_file(header(META | {"model": "["})), "describes its model unreadably"),
    "model_type": (store_file(header(META | {"model": 3})), "describes its model unreadably"),
    "data_cut": (
        store_file(header(**{A: entry()}), ONE[:-1]),
        "must have 16 bytes of tensors, got 15. Is it cut",
    ),
    "data_more": (store_file(header(**{A: entry()}), ONE * 2), "must have 16 bytes of tensors, got 32"),
    "data_huge": (
        store_file(header(**{A: entry((2**40, 2**20))})),
        r"must have shape|bytes of tensors, got 0",
    ),
    "overlap": (
        store_file(header(**{A: entry(), B: entry()}), ONE),
        "must begin at byte 16, where the last one ends",
    ),
    "gap": (store_file(header(**{A: entry(), B: entry(begin=32)}), ONE * 3), "must begin at byte 16"),
    "negative": (store_file(header(**{A: entry(begin=-16)}), ONE), "must be F32 with as many bytes"),
    "floats": (store_file(header(**{A: entry() | {"shape": [2.0, 2.0]}}), ONE), "must be F32 with"),
    "bools": (
        store_file(header(**{A: entry((1, 1)) | {"shape": [True, True]}}), ONE[:4]),
        "must be F32 with",
    ),
    "lying": (store_file(header(**{A: entry((2, 2), end=12)}), ONE[:12]), "must be F32 with as many bytes"),
    "half": (store_file(header(**{A: entry((2, 4), end=16, dtype="F16")}), ONE), "must be F32 with"),
    "null": (store_file(header(**{A: None})), "must be F32 with"),
    "one_d": (store_file(header(**{A: entry((4,))}), ONE), r"must have shape \[P, D\]"),
    "no_rows": (store_file(header(**{A: entry((0, 4))})), r"must have shape \[P, D\]"),
    "no_kind": (store_file(header(**{"a": entry()}), ONE), r"must be named KIND/NAME/TENSOR, .* got 'a'"),
    "kind": (store_file(header(**{"suffix/a/prompt": entry()}), ONE), "must be named KIND/NAME/TENSOR"),
    "path": (store_file(header(**{"prepend/../prompt": entry()}), ONE), "a prompt's name must be"),
    "control": (store_file(header(**{"prepend/\x1b[2J/prompt": entry()}), ONE), "a prompt's name must be"),
    "kinds": (
        store_file(header(**{A: entry(), "cached/a/prompt": entry(begin=16)}), ONE * 2),
        "two prompts 'a'",
    ),
    "parameterizations": (
        store_file(
            header(
                **{"prefix.rows/a/cross": entry((1, 1, 2)), "prefix.kv/a/cross_k": entry((1, 1, 1, 2), 8)}
            ),
            ONE,
        ),
        "two prompts 'a'",
    ),
    "tensor": (
        store_file(header(**{"prepend/a/w": entry()}), ONE),
        r"must hold tensor \['prompt'\], got \['w'\]",
    ),
    "unpaired": (store_file(header(**{"prefix.kv/a/cross_k": entry((1, 1, 2, 2))}), ONE), "together, got"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_by_name(name, tmp_path):
    content, message = HOSTILE[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"PromptStore: .*{name}.*{message}"):
        PromptStore(tmp_path / name)


def test_every_truncation_is_refused(path):
    whole = path.read_bytes()
    for length in [*range(900), *range(900, len(whole), 97)]:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="PromptStore: "):
            PromptStore(path)


def test_damage_ends_in_a_value_error_or_in_a_finite_prompt(path):
    whole, draw = path.read_bytes(), np.random.default_rng(0)
    refused = 0
    for _ in range(400):
        broken = bytearray(whole)
        broken[draw.integers(min(1400, len(whole)))] = draw.integers(256)
        path.write_bytes(broken)
        try:
            for prompt in PromptStore(path).values():
                assert all(tensor.isfinite().all() for tensor in prompt.tensors.values())
        except ValueError:
            refused += 1
    assert refused > 150


def test_not_finite_data_and_a_file_cut_short_after_opening(path):
    with PromptStore(path) as store:
        first = store["sst2"].rows
        with path.open("r+b") as stream:
            stream.seek(-4 * D, os.SEEK_END)
            stream.write(struct.pack("<f", float("nan")))
        with pytest.raises(ValueError, match="'prompt' of 'Привет' has NaN or infinity"):
            store["Привет"]
        os.truncate(path, path.stat().st_size - 4 * D)
        with pytest.raises(ValueError, match="was cut short after it was opened: 'Привет' is gone"):
            store["Привет"]
        assert torch.equal(store["sst2"].rows, first)
    with pytest.raises(FileNotFoundError):
        PromptStore(path.parent / "nothing")


def test_large_values_whose_sum_is_infinite_are_read(tmp_path):
    large = PromptFile(torch.full((P, D), 3e38))
    write_store(tmp_path / "store", {"large": large})
    assert torch.equal(PromptStore(tmp_path / "store")["large"].rows, large.rows)


def test_tensors_begin_at_multiples_of_eight_bytes(tmp_path):
    for length in range(1, 9):
        write_store(tmp_path / "store", {"x" * length: PROMPTS["sst2"]})
        (header_bytes,) = struct.unpack("<Q", (tmp_path / "store").read_bytes()[:8])
        assert header_bytes % 8 == 0


def test_more_names_than_a_header_holds_are_not_written(path, monkeypatch):
    before = path.read_bytes()
    monkeypatch.setattr("fastprompt.prompts.store.HEADER_LIMIT", 1000)
    with pytest.raises(
        ValueError, match=r"the names of 20 prompts take .* bytes, more than 1000\. Write several"
    ):
        write_store(path, {f"p{i}": PromptFile(rows(i)) for i in range(20)})
    assert path.read_bytes() == before


def bytes_read():
    with open("/proc/self/io") as stream:
        return int(next(line.split()[1] for line in stream if line.startswith("rchar")))


@pytest.mark.skipif(not os.path.exists("/proc/self/io"), reason="counts what the process reads")
def test_opening_reads_the_header_and_a_prompt_its_own_rows(tmp_path):
    path = tmp_path / "store"
    write_store(path, ((f"prompt {i}", PromptFile(rows(i, 100))) for i in range(300)))
    before = bytes_read()
    store = PromptStore(path)
    opening = bytes_read() - before
    assert opening < 60_000 < path.stat().st_size // 50
    before = bytes_read()
    assert torch.equal(store["prompt 123"].rows, rows(123, 100))
    assert 100 * D * 4 <= bytes_read() - before < 100 * D * 4 + 2_000


@pytest.mark.skipif(not os.path.exists("/proc/self/io"), reason="counts what the process reads")
def test_ten_thousand_prompts(tmp_path):
    """Their data is a hole of 3 GB in the file: zeros that take no space on the disk."""
    path, count, size = tmp_path / "store", 10_000, 100 * 768 * 4
    entries = {f"cached/task {i}/prompt": entry((100, 768), begin=i * size) for i in range(count)}
    path.write_bytes(store_file(header(**entries)))
    head = path.stat().st_size
    os.truncate(path, head + count * size)
    before = bytes_read()
    store = PromptStore(path)
    assert len(store) == count
    batch = [store[f"task {i}"].rows for i in range(0, count, count // 32)]
    assert all(rows.shape == (100, 768) for rows in batch)
    assert bytes_read() - before < head + len(batch) * size + 10_000


WRITER = """
import resource, sys, torch
from fastprompt.prompts import PromptFile
from fastprompt.prompts.store import PromptStore, write_store

def largest():  # bytes of memory, so far
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

write_store(sys.argv[1], [("warm", PromptFile(torch.randn(100, 768)))])
before = largest()
write_store(sys.argv[1], ((f"p{i}", PromptFile(torch.randn(100, 768))) for i in range(150)))  # 46 MB
store = PromptStore(sys.argv[1])
for i in range(0, 150, 2):
    store[f"p{i}"]
print(largest() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units elsewhere")
def test_a_large_store_takes_little_memory(tmp_path):
    command = [sys.executable, "-c", WRITER, str(tmp_path / "store")]
    grown = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert (tmp_path / "store").stat().st_size > 150 * 100 * 768 * 4
    assert grown < 20 << 20

# SPDX-License-Identifier: Apache-2.0
"""Prompt files: what is written is read back, other projects' files are read, and a broken file is only refused."""

import dataclasses
import json
import os
import pickle
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fastprompt.prompts import ModelIdentity, PromptFile, files, read_prompt, write_prompt

D = 32


@pytest.fixture
def rows():
    return torch.randn(5, D, generator=torch.Generator().manual_seed(0)) * 2000  # as large as trained prompts


def test_round_trip(rows, tmp_path):
    path = tmp_path / "new folder" / "sst2.safetensors"
    write_prompt(path, PromptFile(rows, init="labels", name="sst2"))
    again = read_prompt(path, width=D)
    assert torch.equal(again.rows, rows)
    assert (again.kind, again.init, again.name, again.model) == ("prepend", "labels", "sst2", None)


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f2", "<f8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npy_of_the_original_project_has_no_suffix(dtype, order, rows, tmp_path):
    path = tmp_path / "encoder.prompt.prompt.prompt"
    values = np.asarray(rows.numpy(), dtype=dtype, order=order)
    with path.open("wb") as stream:
        np.save(stream, values)
    assert np.array_equal(read_prompt(path).rows.numpy(), values.astype(np.float32))


@pytest.mark.parametrize("submodules", [None, 1, 2])
def test_peft_folder(submodules, make_model, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(
        task_type="SEQ_2_SEQ_LM", num_virtual_tokens=5, num_transformer_submodules=submodules
    )
    theirs = peft.get_peft_model(make_model(), config)
    theirs.save_pretrained(tmp_path)
    expected = theirs.prompt_encoder["default"].embedding.weight
    assert len(expected) == (5 if submodules == 1 else 10)
    assert torch.equal(read_prompt(tmp_path, width=D).rows, expected[:5].cpu())


def test_a_failed_write_leaves_the_old_file(rows, tmp_path, monkeypatch):
    path = tmp_path / "prompt.safetensors"
    write_prompt(path, PromptFile(rows))
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("no")))
    with pytest.raises(OSError, match="no"):
        write_prompt(path, PromptFile(rows * 2))
    assert torch.equal(read_prompt(path).rows, rows)
    assert os.listdir(tmp_path) == ["prompt.safetensors"]


def test_a_written_file_has_ordinary_permissions(rows, tmp_path):
    write_prompt(tmp_path / "prompt", PromptFile(rows))
    (tmp_path / "plain").touch()
    assert (tmp_path / "prompt").stat().st_mode == (tmp_path / "plain").stat().st_mode


def npy(shape, data=b"", descr="<f4"):
    header = repr({"descr": descr, "fortran_order": False, "shape": shape}).encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


def safetensors(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


OURS = {"format": "fastprompt.prompt", "version": "1", "kind": "prepend"}


def prompt_header(shape, dtype="F32", end=None, **metadata):
    end = 4 * int(np.prod(shape)) if end is None else end
    tensor = {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}
    return {"__metadata__": OURS | metadata, "prompt": tensor}


IDENTITY = [field.name for field in dataclasses.fields(ModelIdentity)]
ONE = struct.pack("<4f", 1, 2, 3, 4)
HOSTILE = {
    "empty": (b"", "no safetensors file"),
    "text": (b"hello, this is a prompt", "no safetensors file"),
    "pickle": (pickle.dumps({"prompt": [1.0]}), "run code and are not read"),
    "zip": (b"PK\x03\x04" + b"0" * 40, "run code and are not read"),
    "npy_objects": (npy((1,), pickle.dumps([1]), "|O"), "Python objects"),
    "npy_truncated": (npy((4, 4), ONE), "no readable .npy"),
    "npy_huge": (npy((2**40, 2**20)), "no readable .npy"),
    "npy_overflow": (npy((2**62, 2**62)), "no readable .npy"),
    "npy_negative": (npy((-4, -4), ONE * 4), "no readable .npy|must have shape"),
    "npy_bad_header": (b"\x93NUMPY\x01\x00\x08\x00{'descr'(", "no readable .npy"),
    "npy_code_header": (b"\x93NUMPY\x01\x00\x14\x00__import__('os').abc", "no readable .npy"),
    "npy_deep_header": (b"\x93NUMPY\x01\x00" + struct.pack("<H", 9000) + b"(" * 9000, "no readable .npy"),
    "npy_signs": (b"\x93NUMPY\x01\x00" + struct.pack("<H", 9001) + b"-" * 9000 + b"1", "no readable .npy"),
    "npy_version": (b"\x93NUMPY\x09\x00\x00\x00", "no readable .npy"),
    "npy_scalar": (npy((), ONE), r"must have shape \[P, D\]"),
    "npy_3d": (npy((1, 2, 2), ONE), r"must have shape .* got \[1, 2, 2\]"),
    "npy_no_rows": (npy((0, 4)), "must have shape|no readable .npy"),
    "npy_ints": (npy((2, 2), ONE, "<i4"), "must hold floats, got dtype int32"),
    "npy_strings": (npy((2, 2), ONE, "|S4"), "must hold floats"),
    "npy_nan": (npy((2, 2), struct.pack("<4f", 1, 2, 3, float("nan"))), "NaN or infinity in 1 of its 2 rows"),
    "npy_beyond_fp32": (npy((1, 1), struct.pack("<d", 1e300), "<f8"), "NaN or infinity"),
    "st_truncated": (safetensors(prompt_header([2, 2]), ONE[:-1]), "no readable safetensors"),
    "st_header_cut": (safetensors(prompt_header([2, 2]))[:40], "no readable safetensors"),
    "st_header_length": (struct.pack("<Q", 2**60) + b"{}", "no readable safetensors"),
    "st_huge": (safetensors(prompt_header([2**40, 2**20], end=2**62)), "no readable safetensors"),
    "st_lying_shape": (safetensors(prompt_header([2**31, 2**31], end=16), ONE), "no readable safetensors"),
    "st_deep": (safetensors(b"{" + b'"a":[' * 100_000), "no readable safetensors"),
    "st_other": (safetensors({"w": prompt_header([2, 2])["prompt"]}, ONE), r"other tensors \['w'\]"),
    "st_no_tensor": (safetensors({"__metadata__": OURS}), "must hold tensor 'prompt'"),
    "st_1d": (safetensors(prompt_header([4]), ONE), r"must have shape .* got \[4\]"),
    "st_ints": (safetensors(prompt_header([2, 2], "I32"), ONE), "must hold floats"),
    "st_inf": (
        safetensors(prompt_header([1, 4]), struct.pack("<4f", 1, 2, 3, float("inf"))),
        "NaN or infinity",
    ),
    "st_newer": (safetensors(prompt_header([2, 2], version="2"), ONE), "must have version 1"),
    "st_kind": (
        safetensors(prompt_header([2, 2], kind="prefix"), ONE),
        "kind prefix. It may come from a newer",
    ),
    "st_model": (safetensors(prompt_header([2, 2], model="{"), ONE), "describes its model unreadably"),
    "st_model_keys": (safetensors(prompt_header([2, 2], model='{"a": 1}'), ONE), "describes its model"),
    "st_model_types": (
        safetensors(prompt_header([2, 2], model=json.dumps(dict.fromkeys(IDENTITY, 5))), ONE),
        "describes its model unreadably: name_or_path must be .*str.*, got 5",
    ),
    "st_model_deep": (safetensors(prompt_header([2, 2], model="[" * 99_999), ONE), "describes its model"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_by_name(name, tmp_path):
    content, message = HOSTILE[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises((ValueError, TypeError), match=f"read_prompt: .*{name}") as caught:
        read_prompt(path)
    assert caught.match(message)


def test_a_sparse_file_as_large_as_it_says_is_refused_before_it_is_read(tmp_path):
    for name, content in (
        ("sparse.npy", npy((2**20, 2**18))),
        ("sparse.safetensors", safetensors(prompt_header([2**20, 2**18]))),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        os.truncate(path, len(content) + 2**40)
        with pytest.raises(ValueError, match=r"1 <= P <= 65536|unable to mmap"):
            read_prompt(path)


def test_a_shape_that_cannot_be_a_prompt_is_refused_before_its_data_is_read(tmp_path, monkeypatch):
    path = tmp_path / "tall.safetensors"
    save_file({"prompt": torch.zeros(2**17, 1)}, path, OURS)
    monkeypatch.setattr(files, "checked_rows", lambda *_: pytest.fail("the data was read"))
    with pytest.raises(ValueError, match=r"1 <= P <= 65536, got \[131072, 1\]"):
        read_prompt(path)


@pytest.mark.parametrize("kind", ["npy", "safetensors"])
def test_every_truncation_and_many_flipped_bytes_end_in_a_value_error_or_a_finite_prompt(
    kind, rows, tmp_path
):
    path = tmp_path / "prompt"
    if kind == "npy":
        with path.open("wb") as stream:
            np.save(stream, rows[:2, :8].numpy())
    else:
        write_prompt(path, PromptFile(rows[:2, :8], name="x"))
    whole = path.read_bytes()
    draw = np.random.default_rng(0)
    damaged = [whole[:n] for n in range(len(whole))]
    for _ in range(300):
        broken = bytearray(whole)
        broken[draw.integers(len(whole))] = draw.integers(256)
        damaged.append(bytes(broken))
    refused = 0
    for content in damaged:
        path.write_bytes(content)
        try:
            read = read_prompt(path)
        except (ValueError, TypeError):
            refused += 1
        else:
            assert read.rows.isfinite().all()
            assert read.rows.numel() == 16
    assert refused >= len(whole)


PEFT = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2, "num_transformer_submodules": 2}


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        (None, {}, "has no adapter_config.json"),
        ("{", {}, "no readable JSON"),
        ("[" * 100_000, {}, "no readable JSON"),
        ("[]", {}, "must hold a JSON object, got list"),
        (" " * 2**21 + "{}", {}, "no readable JSON"),
        (PEFT | {"peft_type": "LORA"}, {}, "must be a PROMPT_TUNING adapter .* got 'LORA'"),
        (PEFT | {"num_virtual_tokens": "2"}, {}, "got 'PROMPT_TUNING' with '2'"),
        (PEFT | {"num_virtual_tokens": -2}, {"prompt_embeddings": (4, D)}, "must have shape"),
        (PEFT | {"num_transformer_submodules": 3}, {"prompt_embeddings": (6, D)}, "at most 2"),
        (PEFT, None, "no adapter_model.safetensors. Save the adapter again"),
        (PEFT, {"other": (4, D)}, "must hold tensor 'prompt_embeddings', got"),
        (PEFT, {"prompt_embeddings": (5, D)}, r"\[4, 32\] .* got \[5, 32\]"),
        (PEFT, {"prompt_embeddings": (4, D + 1)}, r"\[4, 32\] .* got \[4, 33\]"),
    ],
)
def test_hostile_peft_folders(config, tensors, message, tmp_path):
    if config is not None:
        text = config if isinstance(config, str) else json.dumps(config)
        (tmp_path / "adapter_config.json").write_text(text)
    if tensors:
        values = {name: torch.zeros(shape) for name, shape in tensors.items()}
        save_file(values, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=message):
        read_prompt(tmp_path, width=D)


def test_width_and_presence(rows, tmp_path):
    write_prompt(tmp_path / "prompt", PromptFile(rows))
    with pytest.raises(ValueError, match=r"must have shape \[P, D\]=\[P, 64\].* got \[5, 32\]"):
        read_prompt(tmp_path / "prompt", width=64)
    with pytest.raises(FileNotFoundError):
        read_prompt(tmp_path / "nothing")
    with pytest.raises(ValueError, match="write_prompt: rows has NaN or infinity"):
        write_prompt(tmp_path / "prompt", PromptFile(rows / 0))

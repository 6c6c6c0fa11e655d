# SPDX-License-Identifier: Apache-2.0
"""Prompt files: what is written is read back, other projects' files are read, and a broken file is only refused."""

import dataclasses
import json
import os
import pickle
import resource
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import fastprompt
from fastprompt.prompts import ModelIdentity, PromptFile, files, read_prompt, write_prompt
from fastprompt.prompts.config import SITES
from fastprompt.prompts.layout import ModelShape, check_layout

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
    write_prompt(path, PromptFile(rows.T))  # columns follow each other there
    assert torch.equal(read_prompt(path).rows, rows.T)


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f2", "<f8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npy_of_the_original_project_has_no_suffix(dtype, order, rows, tmp_path):
    path = tmp_path / "encoder.prompt.prompt.prompt"
    values = np.asarray(rows.numpy(), dtype=dtype, order=order)
    with path.open("wb") as stream:
        np.save(stream, values)
    assert np.array_equal(read_prompt(path).rows.numpy(), values.astype(np.float32))


def test_npy_is_written_for_the_original_project(rows, tmp_path):
    path = tmp_path / "encoder.prompt.prompt.prompt"
    write_prompt(path, PromptFile(rows), format="npy")
    with path.open("rb") as stream:  # as its from_array initialiser does
        array = np.load(stream)
    assert array.dtype == np.float32
    assert np.array_equal(array, rows.numpy())
    with pytest.raises(ValueError, match="is read as 'prepend', got 'cached'"):
        write_prompt(path, PromptFile(rows, "cached"), format="npy")
    with pytest.raises(ValueError, match=r"format must be one of safetensors, npy, peft, got 'pt'"):
        write_prompt(path, PromptFile(rows), format="pt")


SHAPE = ModelShape(d_model=D, encoder_layers=3, decoder_layers=2, heads=4, head_width=12)
PREFIXES = {
    "rows": {"encoder": (3, 5, D), "decoder": (2, 5, D), "cross": (2, 5, D)},
    "kv": {
        f"{site}_{part}": (n, 5, 4, 12) for site, n in zip(SITES, (3, 2, 2), strict=True) for part in "kv"
    },
}


def prefix(shapes, parameterization):
    draw = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    return PromptFile(tensors, "prefix", parameterization=parameterization)


@pytest.mark.parametrize("sites", [SITES, ("encoder",), ("decoder", "cross"), ("cross",)])
@pytest.mark.parametrize("parameterization", PREFIXES)
def test_a_prefix_of_any_sites_comes_back(parameterization, sites, tmp_path):
    shapes = {n: s for n, s in PREFIXES[parameterization].items() if n.split("_")[0] in sites}
    written = prefix(shapes, parameterization)
    write_prompt(tmp_path / "prefix", written)
    again = read_prompt(tmp_path / "prefix", shape=SHAPE)
    assert (again.kind, again.parameterization) == ("prefix", parameterization)
    assert again.package == fastprompt.__version__
    assert again.tensors.keys() == written.tensors.keys()
    assert all(torch.equal(again.tensors[name], written.tensors[name]) for name in shapes)
    with pytest.raises(ValueError, match=r"a 'prefix' prompt has no rows \[P, D\]; its tensors are"):
        _ = again.rows


def test_a_cached_prompt_keeps_its_kind(rows, tmp_path):
    write_prompt(tmp_path / "prompt", PromptFile(rows, "cached"))
    assert read_prompt(tmp_path / "prompt", shape=SHAPE).kind == "cached"


BAD_PREFIXES = {
    "no tensors": ("rows", {}, r"must hold tensors among \['encoder', 'decoder', 'cross'\], got \[\]"),
    "other name": ("rows", {"encoder": (3, 5, D), "prompt": (5, D)}, "must hold tensors among"),
    "key alone": ("kv", {"cross_k": (2, 5, 4, 12)}, "keys and values together, got"),
    "other site": ("kv", {"shared_k": (2, 5, 4, 12), "shared_v": (2, 5, 4, 12)}, "must hold tensors among"),
    "lengths": (
        "rows",
        {"decoder": (2, 5, D), "encoder": (3, 6, D)},
        r"\[layers, P, D\]=\[3, 5, 32\].*\[3, 6, 32\]",
    ),
    "layers": ("rows", {"cross": (3, 5, D), "decoder": (2, 5, D)}, r"=\[3, 5, 32\].* got \[2, 5, 32\]"),
    "heads": (
        "kv",
        {"cross_k": (2, 5, 4, 12), "cross_v": (2, 5, 3, 16)},
        r"=\[2, 5, 4, 12\].*\[2, 5, 3, 16\]",
    ),
    "rank": ("rows", {"cross": (5, D)}, r"must have shape \[layers, P, D\] with 1 <= layers"),
    "no rows": ("rows", {"cross": (2, 0, D)}, "must have shape"),
    "unknown": (
        "lora",
        {"cross": (2, 5, D)},
        "must have parameterization rows or kv for kind 'prefix', got 'lora'",
    ),
    "none": (None, {"cross": (2, 5, D)}, "got None. It may come from a newer"),
}


@pytest.mark.parametrize("name", BAD_PREFIXES)
def test_tensors_that_are_no_prefix_are_neither_written_nor_read(name, tmp_path):
    parameterization, shapes, message = BAD_PREFIXES[name]
    bad = prefix(shapes, parameterization)
    with pytest.raises(ValueError, match=f"write_prompt: .*{message}"):
        write_prompt(tmp_path / "prefix", bad)
    metadata = (
        OURS | {"kind": "prefix"} | ({"parameterization": parameterization} if parameterization else {})
    )
    save_file(bad.tensors, tmp_path / "prefix", metadata)
    with pytest.raises(ValueError, match=f"read_prompt: .*{message}"):
        read_prompt(tmp_path / "prefix")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder_layers": 4}, r"=\[4, 5, 4, 12\], as the model .* got \[3, 5, 4, 12\]"),
        ({"decoder_layers": 1}, r"tensor '(cross|decoder)_k' must have shape .*=\[1, 5, 4, 12\]"),
        ({"heads": 6}, r"=\[2, 5, 6, 12\]"),
        ({"head_width": 8}, r"=\[2, 5, 4, 8\]"),
    ],
)
def test_a_prefix_of_another_model_is_refused_before_its_data_is_read(change, message, tmp_path, monkeypatch):
    write_prompt(tmp_path / "prefix", prefix(PREFIXES["kv"], "kv"))
    monkeypatch.setattr(files, "finite_fp32", lambda *_: pytest.fail("the data was read"))
    with pytest.raises(ValueError, match=message):
        read_prompt(tmp_path / "prefix", shape=dataclasses.replace(SHAPE, **change))


@pytest.mark.parametrize(
    ("kind", "parameterization", "shapes"),
    [
        ("prepend", None, {"prompt": (65536, 2**14 + 1)}),
        ("prefix", "rows", {"encoder": (1024, 65536, 9), "cross": (1024, 65536, 9)}),
    ],
)
def test_more_elements_than_any_prompt_has_are_refused_by_the_header(kind, parameterization, shapes):
    with pytest.raises(
        ValueError, match=r"x must have at most 1073741824 elements|x: tensor 'prompt' must have"
    ):
        check_layout("x", kind, parameterization, shapes)


def test_a_failed_write_leaves_the_old_file(rows, tmp_path, monkeypatch):
    path = tmp_path / "prompt.safetensors"
    write_prompt(path, PromptFile(rows))
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("no")))
    with pytest.raises(OSError, match="no"):
        write_prompt(path, PromptFile(rows * 2))
    assert torch.equal(read_prompt(path).rows, rows)
    assert os.listdir(tmp_path) == ["prompt.safetensors"]


@pytest.mark.parametrize("name", ["p.safetensors", "p.npy"])
def test_a_full_disk_is_told_and_leaves_the_old_file(name, rows, tmp_path):
    path = tmp_path / name
    write_prompt(path, PromptFile(rows[:2]))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (700, limits[1]))  # less than a stream's buffer
    try:
        with pytest.raises(OSError, match=name):
            write_prompt(path, PromptFile(rows))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert torch.equal(read_prompt(path).rows, rows[:2])
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("length", [2, 5, 9])
@pytest.mark.parametrize(
    ("name", "owner", "mapping"),
    [("p.safetensors", torch.UntypedStorage, "from_file"), ("p.npy", np, "memmap")],
)
def test_a_file_that_is_replaced_while_it_is_opened_is_read_whole(
    name, owner, mapping, length, rows, tmp_path, monkeypatch
):
    path, new, map_file = tmp_path / name, torch.ones(length, D), getattr(owner, mapping)
    write_prompt(path, PromptFile(rows, name="old"))

    def replaced(*args, **how):  # the header is read, and the file is opened again for the data
        monkeypatch.undo()
        write_prompt(path, PromptFile(new, name="new"))
        return map_file(*args, **how)

    monkeypatch.setattr(owner, mapping, replaced)
    found = read_prompt(path)
    assert map_file is getattr(owner, mapping)
    assert torch.equal(found.rows, new)
    assert found.name == (None if name == "p.npy" else "new")


def test_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "p")
    with pytest.raises(ValueError, match=r"is a pipe or a device.*Copy it to a file"):
        read_prompt(tmp_path / "p")


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
    "st_no_tensor": (safetensors({"__metadata__": OURS}), r"must hold tensor \['prompt'\], got \[\]"),
    "st_1d": (safetensors(prompt_header([4]), ONE), r"must have shape .* got \[4\]"),
    "st_ints": (safetensors(prompt_header([2, 2], "I32"), ONE), "must hold floats"),
    "st_inf": (
        safetensors(prompt_header([1, 4]), struct.pack("<4f", 1, 2, 3, float("inf"))),
        "NaN or infinity",
    ),
    "st_newer": (safetensors(prompt_header([2, 2], version="2"), ONE), "must have version 1"),
    "st_kind": (
        safetensors(prompt_header([2, 2], kind="infix"), ONE),
        "got kind 'infix' with None. It may come from a newer",
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
    monkeypatch.setattr(files, "finite_fp32", lambda *_: pytest.fail("the data was read"))
    with pytest.raises(ValueError, match=r"1 <= P <= 65536 .* got \[131072, 1\]"):
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


def test_width_and_presence(rows, tmp_path):
    write_prompt(tmp_path / "prompt", PromptFile(rows))
    with pytest.raises(ValueError, match=r"must have shape \[P, D\]=\[P, 64\].* got \[5, 32\]"):
        read_prompt(tmp_path / "prompt", width=64)
    with pytest.raises(FileNotFoundError):
        read_prompt(tmp_path / "nothing")
    with pytest.raises(ValueError, match="tensor 'prompt' has NaN or infinity in 5 of its 5 rows"):
        write_prompt(tmp_path / "prompt", PromptFile(rows / 0))


@pytest.mark.parametrize("more", [{}, {"model.lm_head.weight": torch.ones(3, 4)}])
def test_the_state_of_a_model_is_told_from_a_prompt(more, tmp_path):
    """Of which Trainer's checkpoints are files."""
    path = tmp_path / "model.safetensors"
    save_file({"prompts.default": torch.ones(2, 4)} | more, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"the state of a PromptModel.*tuned\.load_state_dict"):
        read_prompt(path)
    save_file({}, path)
    with pytest.raises(ValueError, match=r"holds other tensors \[\], not a prompt"):
        read_prompt(path)

# SPDX-License-Identifier: Apache-2.0
"""PromptStore: thousands of prompts in one file, or in a folder of prompt files, of which only the used are read.

The file is a safetensors file. A tensor's name is KIND/NAME/TENSOR, KIND being prepend, cached, prefix.rows or
prefix.kv; all are fp32. Its header is read when the store is opened, and a prompt's own bytes when it is asked for, at
their place: the file is not mapped, because a mapped file that someone cuts short ends the process.
"""

import json
import os
import shutil
import struct
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

import fastprompt
from fastprompt.prompts._safe_files import replacing
from fastprompt.prompts.files import checked_prompt, read_identity, read_prompt
from fastprompt.prompts.identity import ModelIdentity
from fastprompt.prompts.layout import Shape, check_layout, elements
from fastprompt.prompts.prompt_file import PromptFile

FORMAT, VERSION = "fastprompt.store", "1"
HEADER_LIMIT = 16 << 20  # a prompt takes about 100 bytes of it; JSON may take 30 times its size in memory
_KINDS = {
    "prepend": ("prepend", None),
    "cached": ("cached", None),
    "prefix.rows": ("prefix", "rows"),
    "prefix.kv": ("prefix", "kv"),
}
_CACHE_SUFFIX, _SUFFIX = ".cache.safetensors", ".safetensors"


class _Place(NamedTuple):
    """Where a tensor's bytes lie, counted from the end of the header."""

    shape: Shape
    begin: int


class _Entry(NamedTuple):
    kind: str
    parameterization: str | None
    places: dict[str, _Place]


class PromptStore(Mapping[str, PromptFile]):
    """Prompts by name, read when asked for: ``store["sst2"]`` is a PromptFile of its own memory.

    Opening a file reads its header, opening a folder lists it; neither reads a prompt. Threads may share a store.
    A copy or pickle of it opens the file again.

    Args:
        path: a file of :func:`write_store`, or a folder of prompt files ``NAME.safetensors``.

    Raises:
        FileNotFoundError: there is nothing at ``path``.
        ValueError: the file is no store, or is broken or cut short.
        OSError: it is a file, and the system is Windows.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.model: ModelIdentity | None = None
        self._stream: BinaryIO | None = None
        self._files: dict[str, Path] = {}
        self._entries: dict[str, _Entry] = {}
        if self.path.is_dir():
            names = sorted(os.listdir(self.path))
            prompts = [n for n in names if n.endswith(_SUFFIX) and not n.endswith(_CACHE_SUFFIX)]
            self._files = {n.removesuffix(_SUFFIX): self.path / n for n in prompts if not n.startswith(".")}
            return
        self._stream = self.path.open("rb", buffering=0)
        try:
            if not hasattr(os, "preadv"):  # threads and forked processes read at once
                raise OSError(
                    f"PromptStore: {self.path} is one file, of which this system cannot read parts by their place. "
                    "Use a folder of prompt files"
                )
            self._data = self._read_header(self._stream)
        except BaseException:
            self.close()
            raise

    def __getitem__(self, name: str) -> PromptFile:
        """The prompt, its tensors fp32 on the CPU.

        Raises:
            KeyError: there is none.
            ValueError: its data is broken, or the store is closed.
            FileNotFoundError, TypeError: of a folder, its file is gone since, or does not hold floats.
        """
        if name in self._files:
            return read_prompt(self._files[name])
        if name not in self._entries:
            raise KeyError(f"PromptStore: there is no prompt {name!r} in {self.path}")
        entry = self._entries[name]
        tensors = {tensor: self._read(name, tensor, place) for tensor, place in entry.places.items()}
        return PromptFile(
            tensors, entry.kind, name=name, model=self.model, parameterization=entry.parameterization
        )

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and (name in self._entries or name in self._files)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files or self._entries)

    def __len__(self) -> int:
        return len(self._files) + len(self._entries)

    def __repr__(self) -> str:
        return f"PromptStore({str(self.path)!r}, {len(self)} prompts)"

    def __reduce__(self) -> tuple[Any, ...]:
        return PromptStore, (self.path,)

    def __enter__(self) -> "PromptStore":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file. Prompts that were read stay."""
        if self._stream is not None:
            self._stream.close()

    def _read(self, name: str, tensor: str, place: _Place) -> Tensor:
        values = torch.empty(place.shape, dtype=torch.float32, device="cpu")
        left = memoryview(values.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        assert self._stream is not None
        if self._stream.closed:
            raise ValueError(
                f"PromptStore: {self.path} is closed, and {name!r} has to be read from it. Open it again"
            )
        at = self._data + place.begin
        while left:
            count = os.preadv(self._stream.fileno(), [left], at)
            if count == 0:
                raise ValueError(
                    f"PromptStore: {self.path} was cut short after it was opened: {name!r} is gone"
                )
            left, at = left[count:], at + count
        # The sum is a fast question, and infinite for some that are all finite: then each is asked.
        if not values.sum().isfinite() and not values.isfinite().all():
            raise ValueError(f"PromptStore: {self.path}: {tensor!r} of {name!r} has NaN or infinity")
        return values

    def _read_header(self, stream: BinaryIO) -> int:
        """Fill in model and entries; returns where the data begins."""
        what, size = f"PromptStore: {self.path}", os.fstat(stream.fileno()).st_size
        head = stream.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= length <= min(HEADER_LIMIT, size - 8):
            raise ValueError(
                f"{what} is no store, or is cut short: its header must have 2 to {HEADER_LIMIT} bytes within the "
                f"file's {size}, got {length}"
            )
        try:
            header = json.loads(_read_all(stream, length), object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{what} has no readable header: {error}") from None
        metadata = header.pop("__metadata__", None) if isinstance(header, dict) else None
        if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
            raise ValueError(f"{what} is no store. One prompt's file is read by read_prompt or load_prompt")
        if metadata.get("version") != VERSION:
            got = metadata.get("version")
            raise ValueError(
                f"{what} must have version {VERSION}, got {got!r}. It may come from a newer release"
            )
        self.model = read_identity(what, metadata)
        places = {key: _place(f"{what}: {key!r}", value) for key, value in header.items()}
        _check_gapless(what, places, size - 8 - length)
        for key, place in places.items():
            self._add(what, key, place)
        for name, entry in self._entries.items():
            shapes = {tensor: place.shape for tensor, place in entry.places.items()}
            check_layout(f"{what}: {name!r}", entry.kind, entry.parameterization, shapes)
        return 8 + length

    def _add(self, what: str, key: str, place: _Place) -> None:
        kind, name, tensor = key.split("/") if key.count("/") == 2 else ("", key, "")
        if kind not in _KINDS:
            raise ValueError(
                f"{what}: tensors must be named KIND/NAME/TENSOR, KIND of {list(_KINDS)}, got {key!r}"
            )
        check_store_name(what, name)
        entry = self._entries.setdefault(name, _Entry(*_KINDS[kind], {}))
        if entry[:2] != _KINDS[kind]:
            raise ValueError(f"{what}: there are two prompts {name!r}")
        entry.places[tensor] = place


def write_store(
    path: str | os.PathLike[str],
    prompts: Mapping[str, PromptFile] | Iterable[tuple[str, PromptFile]],
    *,
    model: ModelIdentity | None = None,
) -> None:
    """Write prompts as one file for :class:`PromptStore`, one after the other: memory for one of them is enough.

    The file appears whole or not at all. While it is written, it takes twice its space on the disk.

    Args:
        path: the file.
        prompts: the prompts by name, or pairs, of a generator for instance. A PromptStore is such a mapping.
        model: the model that all of them belong to; None: the one that they name, if they do.

    Raises:
        TypeError, ValueError: a name that cannot be one or is there twice, prompts of different models, values that
            are not finite floats, or more names than the header may have.
    """
    pairs = prompts.items() if isinstance(prompts, Mapping) else prompts
    names: set[str] = set()
    header: dict[str, Any] = {}
    with tempfile.TemporaryFile(dir=_made(Path(path).parent)) as data:
        for name, prompt in pairs:
            check_store_name("write_store", name)
            if name in names:
                raise ValueError(f"write_store: there are two prompts {name!r}")
            names.add(name)
            checked = checked_prompt(f"write_store: {name!r}", prompt)
            model = _one_model(name, model, checked.model)
            kind = ".".join(filter(None, (checked.kind, checked.parameterization)))
            for tensor, values in checked.tensors.items():
                begin = data.tell()
                data.write(memoryview(values.numpy()))  # type: ignore[arg-type]
                entry = {"dtype": "F32", "shape": list(values.shape), "data_offsets": [begin, data.tell()]}
                header[f"{kind}/{name}/{tensor}"] = entry
        metadata = {"format": FORMAT, "version": VERSION, "package": fastprompt.__version__}
        if model is not None:
            metadata["model"] = json.dumps(asdict(model))
        text = json.dumps({"__metadata__": metadata, **header}, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # tensors begin at multiples of 8
        if len(text) > HEADER_LIMIT:
            raise ValueError(
                f"write_store: the names of {len(names)} prompts take {len(text)} bytes, more than {HEADER_LIMIT}. "
                "Write several stores"
            )
        data.seek(0)
        with replacing(path) as stream:
            stream.write(struct.pack("<Q", len(text)) + text)
            shutil.copyfileobj(data, stream, 1 << 20)


def check_store_name(what: str, name: object) -> None:
    """Raise ValueError unless ``name`` may name a prompt of a store, and a file."""
    good = isinstance(name, str) and 0 < len(name) <= 200 and name.isprintable()
    if not good or name[0] == "." or "/" in name or "\\" in name:  # type: ignore[index, operator]
        raise ValueError(
            f"{what}: a prompt's name must be a str of 1 to 200 printable characters without '/' and '\\' that does "
            f"not begin with '.', got {name!r:.80}"
        )


def _one_model(name: str, known: ModelIdentity | None, new: ModelIdentity | None) -> ModelIdentity | None:
    if known is None or new is None:
        return known or new
    difference = new.difference(known)
    if difference is not None:
        raise ValueError(f"write_store: {name!r} belongs to another model than those before it: {difference}")
    return known


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _read_all(stream: BinaryIO, length: int) -> bytes:
    parts = []
    while length and (part := stream.read(length)):
        parts.append(part)
        length -= len(part)
    return b"".join(parts)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r:.80} is there twice")
        found[key] = value
    return found


def _place(what: str, value: Any) -> _Place:
    """Of a header's entry, which may be anything that JSON can say."""
    entry = value if isinstance(value, dict) else {}
    shape, offsets = (_sizes(entry.get(key)) for key in ("shape", "data_offsets"))
    size = 4 * elements(shape)
    fits = len(offsets) == 2 and offsets[1] - offsets[0] == size
    if entry.get("dtype") != "F32" or not 1 <= len(shape) <= 4 or not fits:
        raise ValueError(f"{what} must be F32 with as many bytes as its shape has, got {value!r:.80}")
    return _Place(shape, offsets[0])


def _sizes(values: Any) -> Shape:
    """A list of sizes; () if it is anything else."""
    good = isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)
    return tuple(values) if good else ()


def _check_gapless(what: str, places: Mapping[str, _Place], size: int) -> None:
    """The tensors must fill the ``size`` bytes after the header, one after the other."""
    end = 0
    for place in sorted(places.values(), key=lambda place: place.begin):
        if place.begin != end:
            raise ValueError(
                f"{what}: a tensor must begin at byte {end}, where the last one ends, got {place.begin}"
            )
        end += 4 * elements(place.shape)
    if end != size:
        raise ValueError(f"{what} must have {end} bytes of tensors, got {size}. Is it cut short?")

# SPDX-License-Identifier: Apache-2.0
"""Files that appear whole or not at all, and safetensors and JSON files that are judged before they are read."""

import json
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fastprompt.prompts.layout import Shape

MOVES = 100  # so often another file may take a name while it is opened
JSON_LIMIT = 1 << 20  # an adapter_config.json has about a thousand bytes
_FLOATS = ("F64", "F32", "F16", "BF16")


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A stream whose bytes become the file at ``path`` when the block ends well; else they are gone."""
    target = Path(path).resolve()  # of a link, what it names
    if target.is_dir():
        raise IsADirectoryError(f"{path} is a folder. Give the name of a file")
    target.parent.mkdir(parents=True, exist_ok=True)
    # Not tempfile: it makes files private to their owner, and os.replace would hand that on. A name of its own: the
    # target's may be as long as names get.
    partial = target.with_name(f".{uuid.uuid4().hex}")
    try:
        with partial.open("xb") as stream:
            yield stream
        os.replace(partial, target)
    except OSError as error:
        if error.errno and error.filename is None:  # a full disk names no file
            error.filename = os.fspath(path)
        raise
    finally:
        partial.unlink(missing_ok=True)


def write_safetensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str | None]
) -> None:
    """Write ``tensors`` and what of ``metadata`` is not None."""
    given = {key: value for key, value in metadata.items() if value is not None}
    with replacing(path) as stream:
        stream.write(save(dict(tensors), given))


@contextmanager
def opened(who: str, source: Path) -> Iterator[Any]:
    """The open safetensors file; whatever goes wrong with its bytes in the block is a ValueError."""
    try:
        with open_once(source, lambda: safe_open(source, framework="pt", device="cpu")) as handle:
            yield handle
    except (SafetensorError, RuntimeError) as error:  # RuntimeError: torch cannot map a file of that size
        raise ValueError(f"{who}: {source} is no readable safetensors file: {error}") from error


def open_once(source: Path, opening: Callable[[], Any]) -> Any:
    """What ``opening`` makes of one file. It opens the name twice, as safetensors and numpy do for header and data, and
    between them another file may be moved there, as by :func:`replacing`. Then it is called again.
    """
    for _ in range(MOVES):
        with source.open("rb") as stream:  # open, so that no other file gets its number
            try:
                found = opening()
            except Exception:
                if _is_there(stream, source):
                    raise
                continue
            if _is_there(stream, source):
                return found
    raise OSError(f"{source} is another file each time it is opened")


def _is_there(stream: BinaryIO, source: Path) -> bool:
    return os.path.samestat(os.fstat(stream.fileno()), source.stat())


def float_shapes(what: str, handle: Any) -> dict[str, Shape]:
    """The shapes of an open file's tensors, from its header. TypeError if one does not hold floats."""
    shapes = {}
    for name in sorted(handle.keys()):
        part = handle.get_slice(name)
        if part.get_dtype() not in _FLOATS:
            raise TypeError(f"{what}: tensor {name!r} must hold floats, got dtype {part.get_dtype()}")
        shapes[name] = tuple(part.get_shape())
    return shapes


def read_json(who: str, path: Path) -> dict[str, Any]:
    """The JSON object in the file at ``path``."""
    with path.open("rb") as stream:
        text = stream.read(JSON_LIMIT)
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{who}: {path} is no readable JSON of at most 1 MiB: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{who}: {path} must hold a JSON object, got {type(values).__name__}")
    return values

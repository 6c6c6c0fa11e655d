# SPDX-License-Identifier: Apache-2.0
"""Prompt files: ours (one safetensors file), the original project's .npy, and PEFT adapter folders.

Files come from strangers. Nothing here unpickles, a declared shape is checked before memory is taken for it,
and whatever is wrong inside a file ends as an error that names it.
"""

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fastprompt.prompts.config import KINDS
from fastprompt.prompts.identity import ModelIdentity
from fastprompt.prompts.rows import check_shape, checked_rows

_FORMAT, _VERSION, _TENSOR = "fastprompt.prompt", "1", "prompt"
_JSON_LIMIT = 1 << 20  # an adapter_config.json has about a thousand bytes


@dataclass(frozen=True, eq=False)
class PromptFile:
    """What a prompt file holds.

    Args:
        rows: [P, D], fp32, on the CPU.
        kind: as in PromptConfig.
        init: how the prompt began, if the file says so.
        name: what it was called in the model that saved it, if the file says so.
        model: the model it was trained for; only our own format says so.
    """

    rows: Tensor
    kind: str = "prepend"
    init: str | None = None
    name: str | None = None
    model: ModelIdentity | None = None


def write_prompt(path: str | os.PathLike[str], prompt: PromptFile) -> None:
    """Write ``prompt`` as one safetensors file: tensor "prompt" [P, D] in fp32, the rest as metadata.

    The file appears whole or not at all: it is written beside its place and moved there.

    Raises:
        ValueError: rows that are not finite. OSError: as the file system has it.
    """
    rows = checked_rows("write_prompt: rows", prompt.rows)
    metadata = {"format": _FORMAT, "version": _VERSION, "kind": prompt.kind}
    if prompt.init is not None:
        metadata["init"] = prompt.init
    if prompt.name is not None:
        metadata["name"] = prompt.name
    if prompt.model is not None:
        metadata["model"] = json.dumps(asdict(prompt.model))
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Not tempfile: it makes files private to their owner, and os.replace would hand that on to the prompt.
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        partial.write_bytes(save({_TENSOR: rows}, metadata))
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def read_prompt(path: str | os.PathLike[str], *, width: int | None = None) -> PromptFile:
    """Read a prompt file: one of ``write_prompt``, a .npy [P, D], or a PEFT PROMPT_TUNING adapter's folder.

    What a file is shows in its first bytes, not in its name: google-research/prompt-tuning writes .npy files
    called ``encoder.prompt.prompt.prompt``. PEFT stores 2P rows for a T5 and uses the first P; those are read.

    Args:
        path: the file or folder.
        width: D, where it is known; another width is refused before its data is read.

    Raises:
        FileNotFoundError: there is nothing at ``path``.
        TypeError, ValueError: anything wrong inside, with the path and the remedy.
    """
    source = Path(path)
    if source.is_dir():
        return PromptFile(_read_peft(source, width))
    with source.open("rb") as stream:
        head = stream.read(9)
    if head.startswith(b"\x93NUMPY"):
        return PromptFile(_read_npy(source, width))
    if head.endswith(b"{") and len(head) == 9:  # safetensors: 8 bytes of header length, then the JSON header
        return _read_safetensors(source, width)
    raise ValueError(
        f"read_prompt: {source} is no safetensors file, .npy file or PEFT adapter folder. Pickles (.pt, .bin, "
        ".pkl) run code and are not read: save the array [P, D] with numpy.save"
    )


def _read_safetensors(source: Path, width: int | None) -> PromptFile:
    with _opened(source) as handle:
        metadata = handle.metadata() or {}
        if metadata.get("format") != _FORMAT:
            raise ValueError(
                f"read_prompt: {source} holds other tensors {sorted(handle.keys())[:4]}, not a prompt. "
                "For a PEFT adapter pass its folder"
            )
        version, kind = metadata.get("version"), metadata.get("kind")
        if version != _VERSION or kind not in KINDS:
            raise ValueError(
                f"read_prompt: {source} must have version {_VERSION} and kind {' or '.join(KINDS)}, "
                f"got version {version} and kind {kind}. It may come from a newer release"
            )
        rows = _read_tensor(source, handle, _TENSOR, None, width)
    return PromptFile(rows, kind, metadata.get("init"), metadata.get("name"), _identity(source, metadata))


def _identity(source: Path, metadata: dict[str, str]) -> ModelIdentity | None:
    if "model" not in metadata:
        return None
    try:
        return ModelIdentity(**json.loads(metadata["model"]))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"read_prompt: {source} describes its model unreadably: {error}") from None


def _read_npy(source: Path, width: int | None) -> Tensor:
    try:
        # Mapped, not loaded: whatever shape the header declares, the file's own length bounds it.
        with np.errstate(over="ignore"):  # numpy multiplies the declared shape before it doubts it
            array = np.lib.format.open_memmap(source, mode="r")
    except Exception as error:  # numpy's header parser lets SyntaxError, tokenize and overflow errors out
        raise ValueError(f"read_prompt: {source} is no readable .npy file: {error}") from error
    return checked_rows(f"read_prompt: the array in {source}", array, None, width)


def _read_peft(source: Path, width: int | None) -> Tensor:
    config = _read_json(source / "adapter_config.json")
    kind, num_tokens = config.get("peft_type"), config.get("num_virtual_tokens")
    copies = config.get("num_transformer_submodules") or 1
    if kind != "PROMPT_TUNING" or type(num_tokens) is not int or copies not in (1, 2):
        raise ValueError(
            f"read_prompt: {source} must be a PROMPT_TUNING adapter with num_virtual_tokens and at most 2 "
            f"num_transformer_submodules, got {kind!r} with {num_tokens!r} and {copies!r}"
        )
    weights = source / "adapter_model.safetensors"
    if not weights.is_file():
        raise ValueError(
            f"read_prompt: {source} has no adapter_model.safetensors. Save the adapter again with "
            "safe_serialization=True: adapter_model.bin is a pickle and is not read"
        )
    with _opened(weights) as handle:
        rows = _read_tensor(weights, handle, "prompt_embeddings", copies * num_tokens, width)
    return rows[:num_tokens].clone()


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"read_prompt: {path.parent} has no {path.name}, so it is no PEFT adapter folder")
    with path.open("rb") as stream:
        text = stream.read(_JSON_LIMIT)
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"read_prompt: {path} is no readable JSON of at most 1 MiB: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"read_prompt: {path} must hold a JSON object, got {type(values).__name__}")
    return values


def _read_tensor(source: Path, handle: Any, name: str, rows: int | None, width: int | None) -> Tensor:
    names = sorted(handle.keys())
    if name not in names:
        raise ValueError(f"read_prompt: {source} must hold tensor {name!r}, got {names[:4]}")
    what = f"read_prompt: tensor {name!r} in {source}"
    check_shape(what, tuple(handle.get_slice(name).get_shape()), rows, width)
    return checked_rows(what, handle.get_tensor(name), rows, width)


@contextmanager
def _opened(source: Path) -> Iterator[Any]:
    try:
        with safe_open(source, framework="pt", device="cpu") as handle:
            yield handle
    except (SafetensorError, RuntimeError) as error:  # RuntimeError: torch cannot map a file of that size
        raise ValueError(f"read_prompt: {source} is no readable safetensors file: {error}") from error

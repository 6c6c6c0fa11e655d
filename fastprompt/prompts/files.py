# SPDX-License-Identifier: Apache-2.0
"""Prompt files: ours (one safetensors file), the original project's .npy, and PEFT adapter folders.

Files come from strangers. Nothing here unpickles, a declared shape is checked before memory is taken for it,
and whatever is wrong inside a file ends as an error that names it.
"""

import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from torch import Tensor

import fastprompt
from fastprompt.prompts._safe_files import float_shapes, open_once, opened, replacing, write_safetensors
from fastprompt.prompts.identity import ModelIdentity
from fastprompt.prompts.layout import ModelShape, check_layout
from fastprompt.prompts.peft_files import read_peft, write_peft, write_peft_tasks
from fastprompt.prompts.prompt_file import PromptFile
from fastprompt.prompts.rows import checked_rows, finite_fp32

FORMAT, VERSION = "fastprompt.prompt", "1"
FORMATS = ("safetensors", "npy", "peft")


def write_prompt(
    path: str | os.PathLike[str],
    prompt: PromptFile | Sequence[PromptFile],
    *,
    format: str | None = None,  # noqa: A002
) -> None:
    """Write ``prompt`` for :func:`read_prompt` and for others to read.

    A file appears whole or not at all: it is written beside its place and moved there.

    Args:
        path: the file, or for PEFT the folder.
        prompt: what to write. Several for ``format="peft"``: the tasks of one multitask adapter.
        format: ``"safetensors"``: one file, tensors in fp32, the rest as metadata. ``"npy"``: the rows [P, D] of a
            ``"prepend"`` prompt, as google-research/prompt-tuning has them. ``"peft"``: a folder that
            ``PeftModel.from_pretrained`` loads; see :func:`fastprompt.prompts.peft_files.write_peft` and
            :func:`fastprompt.prompts.peft_files.write_peft_tasks`. None: ``"npy"`` for a path that ends in ``.npy``,
            else ``"safetensors"``.

    Raises:
        TypeError, ValueError: values that are not finite floats, tensors that are no prompt of this kind, or a
            prompt that the format cannot express. OSError: as the file system has it.
    """
    if format is None:
        format = "npy" if Path(path).suffix == ".npy" else "safetensors"  # noqa: A001
    if format not in FORMATS:
        raise ValueError(f"write_prompt: format must be one of {', '.join(FORMATS)}, got {format!r}")
    if not isinstance(prompt, (PromptFile, Sequence)) or isinstance(prompt, str):
        raise TypeError(
            f"write_prompt: prompt must be a PromptFile or a list of them, got {type(prompt).__name__}"
        )
    if not isinstance(prompt, PromptFile):
        if format != "peft":
            raise ValueError(
                f"write_prompt: several prompts are the tasks of one adapter of format='peft', got {format!r}. Write "
                "each by itself, or all with write_store"
            )
        write_peft_tasks(path, [checked_prompt("write_prompt: the prompt", each) for each in prompt])
        return
    checked = checked_prompt("write_prompt: the prompt", prompt)
    if format == "peft":
        write_peft(path, checked)
    elif format == "npy":
        if prompt.kind != "prepend":
            raise ValueError(
                f"write_prompt: a .npy file says nothing of its kind and is read as 'prepend', got {prompt.kind!r}. "
                "Use format='safetensors'"
            )
        array = io.BytesIO()
        np.save(array, checked.rows.numpy())  # in a file itself, numpy overlooks that a disk is full
        with replacing(path) as stream:
            stream.write(array.getbuffer())
    else:
        write_safetensors(path, checked.tensors, prompt_metadata(checked) | {"format": FORMAT})


def prompt_metadata(prompt: PromptFile) -> dict[str, str | None]:
    """What our own files say of a prompt beside its tensors."""
    return {
        "version": VERSION,
        "package": fastprompt.__version__,
        "kind": prompt.kind,
        "parameterization": prompt.parameterization,
        "init": prompt.init,
        "name": prompt.name,
        "model": json.dumps(asdict(prompt.model)) if prompt.model else None,
    }


def read_prompt(
    path: str | os.PathLike[str],
    *,
    width: int | None = None,
    shape: ModelShape | None = None,
    task: int | None = None,
) -> PromptFile:
    """Read a prompt: a file of ``write_prompt``, a .npy [P, D], or the folder of a PEFT adapter.

    What a file is shows in its first bytes, not in its name: google-research/prompt-tuning writes .npy files
    called ``encoder.prompt.prompt.prompt``. How PEFT's tables are read is told in
    :func:`fastprompt.prompts.peft_files.read_peft`.

    Args:
        path: the file or folder.
        width: D, where it is known; another width is refused before its data is read.
        shape: all of the model's sizes, where they are known; likewise.
        task: which task's prompt of a PEFT multitask adapter.

    Raises:
        FileNotFoundError: there is nothing at ``path``.
        TypeError, ValueError: anything wrong inside, with the path and the remedy.
    """
    source = Path(path)
    sizes = {} if shape is None else shape.sizes()
    if width is not None:
        sizes["D"] = width
    if source.is_dir():
        return read_peft(source, sizes, task)
    if task is not None:
        raise ValueError(f"read_prompt: task is read only with a PEFT adapter's folder, and {source} is none")
    if source.exists() and not source.is_file():
        raise ValueError(
            f"read_prompt: {source} is a pipe or a device, and a prompt is read from more than one place of its file. "
            "Copy it to a file"
        )
    with source.open("rb") as stream:
        head = stream.read(9)
    if head.startswith(b"\x93NUMPY"):
        return PromptFile(_read_npy(source, sizes.get("D")))
    if head.endswith(b"{") and len(head) == 9:  # safetensors: 8 bytes of header length, then the JSON header
        return _read_safetensors(source, sizes)
    raise ValueError(
        f"read_prompt: {source} is no safetensors file, .npy file or PEFT adapter folder. Pickles (.pt, .bin, "
        ".pkl) run code and are not read: save the array [P, D] with numpy.save"
    )


def checked_prompt(what: str, prompt: PromptFile) -> PromptFile:
    """The same with tensors that are fit to be written; errors begin with ``what``."""
    if not isinstance(prompt, PromptFile):
        raise TypeError(f"{what} must be a PromptFile, got {type(prompt).__name__}")
    shapes = {name: tuple(tensor.shape) for name, tensor in prompt.tensors.items()}
    check_layout(what, prompt.kind, prompt.parameterization, shapes)
    values = {name: finite_fp32(f"{what}: tensor {name!r}", value) for name, value in prompt.tensors.items()}
    return replace(prompt, values=values)


def _read_safetensors(source: Path, sizes: Mapping[str, int]) -> PromptFile:
    with opened("read_prompt", source) as handle:
        metadata, names = handle.metadata() or {}, list(handle.keys())
        has_prompts = any(name.startswith("prompts.") for name in names)
        is_state = has_prompts and all(name.startswith(("prompts.", "model.")) for name in names)
        if metadata.get("format") != FORMAT and is_state:
            raise ValueError(
                f"read_prompt: {source} holds the state of a PromptModel, as Trainer's checkpoints do. Load it with "
                "tuned.load_state_dict(safetensors.torch.load_file(path))"
            )
        if metadata.get("format") != FORMAT:
            raise ValueError(
                f"read_prompt: {source} holds other tensors {sorted(names)[:4]}, not a prompt. "
                "For a PEFT adapter pass its folder, open a store of prompts with fastprompt.prompts.PromptStore, and "
                "read kept keys with PromptModel.load_caches"
            )
        if metadata.get("version") != VERSION:
            raise ValueError(
                f"read_prompt: {source} must have version {VERSION}, got {metadata.get('version')!r}. "
                "It may come from a newer release"
            )
        what = f"read_prompt: {source}"
        shapes = float_shapes(what, handle)
        kind, parameterization = metadata.get("kind", ""), metadata.get("parameterization")
        check_layout(what, kind, parameterization, shapes, sizes)
        values = {name: finite_fp32(f"{what}: tensor {name!r}", handle.get_tensor(name)) for name in shapes}
    return PromptFile(
        values,
        kind,
        metadata.get("init"),
        metadata.get("name"),
        read_identity(what, metadata),
        parameterization,
        metadata.get("package"),
    )


def read_identity(what: str, metadata: Mapping[str, str]) -> ModelIdentity | None:
    """The model that a file's ``metadata`` describes; None if it says nothing of it."""
    if "model" not in metadata:
        return None
    try:
        return ModelIdentity(**json.loads(metadata["model"]))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{what} describes its model unreadably: {error}") from None


def _read_npy(source: Path, width: int | None) -> Tensor:
    try:
        # Mapped, not loaded: whatever shape the header declares, the file's own length bounds it.
        with np.errstate(over="ignore"):  # numpy multiplies the declared shape before it doubts it
            array = open_once(source, lambda: np.lib.format.open_memmap(source, mode="r"))
    except Exception as error:  # numpy's header parser lets SyntaxError, tokenize and overflow errors out
        raise ValueError(f"read_prompt: {source} is no readable .npy file: {error}") from error
    return checked_rows(f"read_prompt: the array in {source}", array, None, width)

# SPDX-License-Identifier: Apache-2.0
"""PEFT's adapter folders: adapter_config.json and adapter_model.safetensors.

What PEFT 0.21 computes on a T5 from the tables that it stores, and what that is here:

- PROMPT_TUNING and P_TUNING (stored with its MLP applied): ``prompt_embeddings`` [c * P, D]; c = 2 copies for a T5, of
  which the first P rows stand in front of the encoder's input. Kind "prepend".
- MULTITASK_PROMPT_TUNING: ``prompt_embeddings`` [c * P, D] times, by element, the product of the task's
  ``prefix_task_cols`` [tasks, c * P, r] and ``prefix_task_rows`` [tasks, r, D]. One "prepend" prompt per task. With
  c = 2 PEFT's forward also puts the other P rows in front of the decoder's input, its generate does not; nor do we.
- PREFIX_TUNING: ``prompt_embeddings`` [P, 2 * L * H * K], seen as [P, 2L, H, K] and repeated to 4L chunks, four per
  layer: decoder self-attention's keys and values, and two that are dropped. So layer i reads the chunks 4i and 4i + 1
  modulo 2L: for an even L layers i and i + L/2 share theirs, for an odd L no layers do. Kind "prefix", "kv", with
  "decoder_k" and "decoder_v" [Ld, P, H, K]. PEFT puts the prefix P positions before the decoder's first token.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastprompt.prompts._safe_files import float_shapes, opened, read_json, replacing, write_safetensors
from fastprompt.prompts.layout import MAX_ELEMENTS, MAX_LAYERS, Shape, check_layout, check_shape, elements
from fastprompt.prompts.prompt_file import PromptFile
from fastprompt.prompts.rows import finite_fp32

CONFIG, WEIGHTS, TABLE = "adapter_config.json", "adapter_model.safetensors", "prompt_embeddings"
PEFT_TYPES = ("PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "PREFIX_TUNING")


def read_peft(source: Path, sizes: Mapping[str, int], task: int | None = None) -> PromptFile:
    """Read a PEFT adapter's folder as this module's page tells.

    Args:
        source: the folder.
        sizes: the model's, as far as they are known: any of Ld, D, H, K. Without Ld a prefix has the L layers of its
            file; PEFT takes L from the encoder.
        task: of a multitask adapter; may be left out if that has one task.

    Raises:
        TypeError, ValueError: as :func:`fastprompt.prompts.files.read_prompt`.
    """
    if not (source / CONFIG).is_file():
        raise ValueError(f"read_prompt: {source} has no {CONFIG}, so it is no PEFT adapter folder")
    config = read_json("read_prompt", source / CONFIG)
    peft_type, num_tokens = config.get("peft_type"), config.get("num_virtual_tokens")
    copies = config.get("num_transformer_submodules") or 1
    if peft_type not in PEFT_TYPES or type(num_tokens) is not int or copies not in (1, 2):
        raise ValueError(
            f"read_prompt: {source} must be a {', '.join(PEFT_TYPES)} adapter with num_virtual_tokens and at most "
            f"2 num_transformer_submodules, got {peft_type!r} with {num_tokens!r} and {copies!r}"
        )
    if task is not None and peft_type != "MULTITASK_PROMPT_TUNING":
        raise ValueError(f"read_prompt: task is read only with a multitask adapter, {source} is {peft_type}")
    weights = source / WEIGHTS
    if not weights.is_file():
        raise ValueError(
            f"read_prompt: {source} has no {WEIGHTS}. Save the adapter again with "
            "safe_serialization=True: adapter_model.bin is a pickle and is not read"
        )
    with opened("read_prompt", weights) as handle:
        what = f"read_prompt: {weights}"
        shapes = float_shapes(what, handle)
        if peft_type == "PREFIX_TUNING":
            return _read_prefix(what, handle, shapes, config, num_tokens, sizes)
        names = ("prefix_task_cols", "prefix_task_rows") if peft_type.startswith("MULTITASK") else ()
        _check_names(what, shapes, names)
        table = f"{what}: tensor {TABLE!r}"
        check_shape(table, shapes[TABLE], copies * num_tokens, sizes.get("D"))
        rows = finite_fp32(table, handle.get_tensor(TABLE)[:num_tokens])
        if names:
            rows *= _task_factor(what, handle, shapes, rows.shape, task)
            rows = finite_fp32(f"{what}: the prompt of task {task or 0}", rows)
    return PromptFile(rows)


def write_peft(path: str | os.PathLike[str], prompt: PromptFile) -> None:
    """Write a checked ``prompt`` as the folder ``path`` of an adapter that ``PeftModel.from_pretrained`` loads.

    A "prepend" prompt becomes PROMPT_TUNING; the rows of its table that PEFT never reads are zero. A "prefix" of "kv"
    for the decoder's self-attention becomes PREFIX_TUNING, with an odd number of layers, so that none share theirs.

    Raises:
        ValueError: PEFT has no such prompt.
    """
    tensors = prompt.tensors
    config: dict[str, Any] = {"num_transformer_submodules": 2}
    if prompt.kind == "prepend":
        table = torch.cat((prompt.rows, torch.zeros_like(prompt.rows)))
        config |= {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": len(prompt.rows)}
        config |= {"token_dim": table.shape[1]}
    elif set(tensors) == {"decoder_k", "decoder_v"}:
        layers, num_tokens, heads, head_width = tensors["decoder_k"].shape
        table = _prefix_table(tensors["decoder_k"], tensors["decoder_v"])
        config |= {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": num_tokens, "num_layers": _odd(layers)}
        config |= {"token_dim": heads * head_width, "num_attention_heads": heads}
    else:
        named = prompt.kind if prompt.parameterization is None else f"{prompt.kind} {prompt.parameterization}"
        raise ValueError(
            f"write_prompt: PEFT has no {named!r} prompt with {sorted(tensors)}. It has 'prepend', and 'prefix' with "
            "parameterization 'kv' for the decoder's self-attention alone. Use format='safetensors'"
        )
    _write_folder(Path(path), prompt, {TABLE: table}, config)


def write_peft_tasks(path: str | os.PathLike[str], prompts: Sequence[PromptFile]) -> None:
    """Write checked ``prompts``, kind "prepend" and of one length, as one MULTITASK_PROMPT_TUNING adapter.

    Prompt t becomes task t, exactly: the shared rows are ones, and a task's factors are the identity [P, P] and its
    rows [P, D], so that the rank is P. Of one submodule: PEFT's forward and generate then compute the same.

    Raises:
        ValueError: no prompt, or prompts of other kinds or different lengths or widths.
    """
    shapes = [{name: list(tensor.shape) for name, tensor in prompt.tensors.items()} for prompt in prompts]
    if (
        not prompts
        or any(prompt.kind != "prepend" for prompt in prompts)
        or shapes != shapes[:1] * len(prompts)
    ):
        got = [(prompt.kind, shape) for prompt, shape in zip(prompts, shapes, strict=True)]
        raise ValueError(
            f"write_prompt: a multitask adapter holds one or more 'prepend' prompts [P, D] of one length, got {got}. "
            "Write each by itself"
        )
    P, D = prompts[0].rows.shape
    tensors = {
        TABLE: torch.ones(P, D, device="cpu"),
        "prefix_task_cols": torch.eye(P, device="cpu").repeat(len(prompts), 1, 1),
        "prefix_task_rows": torch.stack([prompt.rows for prompt in prompts]),
    }
    config = {"peft_type": "MULTITASK_PROMPT_TUNING", "num_virtual_tokens": P, "token_dim": D}
    config |= {"num_transformer_submodules": 1, "num_tasks": len(prompts), "num_ranks": P}
    _write_folder(Path(path), prompts[0], tensors, config)


def _write_folder(
    folder: Path, prompt: PromptFile, tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> None:
    """``prompt``: one of those in ``tensors``, for its model."""
    write_safetensors(folder / WEIGHTS, tensors, {"format": "pt"})
    common = {
        "task_type": "SEQ_2_SEQ_LM",
        "base_model_name_or_path": prompt.model.name_or_path if prompt.model else None,
        "inference_mode": True,
    }
    with replacing(folder / CONFIG) as stream:  # last: without it the folder is no adapter
        stream.write(json.dumps(common | dict(config), indent=2, sort_keys=True).encode())


def _check_names(what: str, shapes: Mapping[str, Shape], others: tuple[str, ...] = ()) -> None:
    expected = sorted((TABLE, *others))
    if sorted(shapes) != expected:
        raise ValueError(f"{what} must hold tensors {expected}, got {sorted(shapes)[:8]}")


def _task_factor(
    what: str, handle: Any, shapes: Mapping[str, Shape], rows: Shape, task: int | None
) -> Tensor:
    """[P, D], what the task multiplies the shared rows by."""
    cols, factors = shapes["prefix_task_cols"], shapes["prefix_task_rows"]
    table = shapes[TABLE]
    num_tasks, rank = (cols[0], cols[-1]) if len(cols) == 3 else (0, 0)
    if cols != (num_tasks, table[0], rank) or factors != (num_tasks, rank, table[1]):
        raise ValueError(
            f"{what}: prefix_task_cols and prefix_task_rows must have shapes [tasks, {table[0]}, r] and "
            f"[tasks, r, {table[1]}], got {list(cols)} and {list(factors)}"
        )
    if task is None and num_tasks == 1:
        task = 0
    if type(task) is not int or not 0 <= task < num_tasks:
        raise ValueError(f"{what}: task must be an int from 0 to {num_tasks - 1}, got {task!r}")
    if max(cols[1] * rank, rank * factors[2]) > MAX_ELEMENTS:
        raise ValueError(f"{what}: the rank must leave at most {MAX_ELEMENTS} elements, got {rank}")
    left = handle.get_slice("prefix_task_cols")[task, : rows[0]].float()
    return left @ handle.get_slice("prefix_task_rows")[task].float()


def _read_prefix(
    what: str,
    handle: Any,
    shapes: Mapping[str, Shape],
    config: Mapping[str, Any],
    num_tokens: int,
    sizes: Mapping[str, int],
) -> PromptFile:
    _check_names(what, shapes)
    # What is no int counts as 0, which no file may have.
    layers, heads, width = (
        value if type(value := config.get(key)) is int else 0
        for key in ("num_layers", "num_attention_heads", "token_dim")
    )
    plausible = 1 <= layers <= MAX_LAYERS and heads >= 1 and width >= 1 and width % heads == 0
    if not plausible or shapes[TABLE] != (num_tokens, 2 * layers * width):
        raise ValueError(
            f"{what}: tensor {TABLE!r} must have shape [num_virtual_tokens, 2 * num_layers * token_dim] and "
            f"num_attention_heads must divide token_dim, got {list(shapes[TABLE])} for {num_tokens}, {layers} and "
            f"{width}, and {heads} heads"
        )
    if elements(shapes[TABLE]) > MAX_ELEMENTS:
        raise ValueError(f"{what} must have at most {MAX_ELEMENTS} elements, got {list(shapes[TABLE])}")
    decoder_layers = sizes.get("Ld", layers)
    if decoder_layers > layers:
        raise ValueError(
            f"{what} has a prefix for {layers} layers, the model's decoder has {decoder_layers}. "
            "PEFT cannot run it either: train it with num_layers of the decoder"
        )
    kv = (decoder_layers, num_tokens, heads, width // heads)
    check_layout(what, "prefix", "kv", {"decoder_k": kv, "decoder_v": kv}, sizes)
    table = finite_fp32(f"{what}: tensor {TABLE!r}", handle.get_tensor(TABLE))
    chunks = table.view(num_tokens, layers, 2, heads, width // heads)
    # Chunks 4i and 4i + 1 are pair 2i of the L pairs.
    pairs = [2 * layer % layers for layer in range(decoder_layers)]
    keys, values = (chunks[:, pairs, part].transpose(0, 1).contiguous() for part in (0, 1))
    return PromptFile({"decoder_k": keys, "decoder_v": values}, "prefix", parameterization="kv")


def _prefix_table(keys: Tensor, values: Tensor) -> Tensor:
    """[P, 2 * L * H * K] from which PEFT takes these keys and values [Ld, P, H, K]; the pairs it never reads are 0."""
    layers = _odd(len(keys))
    num_tokens, heads, head_width = keys.shape[1:]
    table = keys.new_zeros(num_tokens, layers, 2, heads, head_width)
    for layer, pair in enumerate(torch.stack((keys, values), 2)):  # [P, 2, H, K]
        table[:, 2 * layer % layers] = pair
    return table.flatten(1)


def _odd(layers: int) -> int:
    return layers | 1

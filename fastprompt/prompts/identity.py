# SPDX-License-Identifier: Apache-2.0
"""Which frozen model a prompt was trained for.

A prompt means nothing to another model, and shapes cannot tell: T5 v1.1, its LM-adapted and its FLAN
checkpoints share all of them. The embedding table tells them apart. A cache of keys and values depends on all of the
model, so there all of it is asked: every byte of its weights, and what else makes other results of the same weights.
"""

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from fastprompt._stamp import Stamp, State, adapters_of
from fastprompt._tensors import is_sharded, parts_of

_CHUNK_ELEMENTS = 1 << 22  # at most 8 MiB of bf16 at a time
_CHUNK_WORDS = {"cpu": 1 << 16, "cuda": 1 << 22}  # half a MiB: of a core's own cache; 32 MiB: few launches
_ODD = 0x1E3779B97F4A7C15  # so that no row counts as much as a column
_HASHING_THREADS = 8
# What T5's modules read of their config beside the shapes of their weights and the dropout.
_COMPUTING = (
    "num_heads",
    "d_kv",
    "relative_attention_num_buckets",
    "relative_attention_max_distance",
    "layer_norm_epsilon",
    "is_gated_act",
    "dense_act_fn",
)


@dataclass(frozen=True)
class ModelIdentity:
    """What a prompt file says about its model."""

    name_or_path: str  # for messages: it decides nothing
    model_type: str  # of its config
    vocab_size: int  # V, rows of the embedding table
    d_model: int  # D, its columns
    embedding_dtype: str  # of the table when it was hashed, without "torch."
    embedding_sha256: str  # of the table rounded to bf16
    float16_sha256: str = ""  # of a float32 table: what embedding_sha256 is after a load in float16

    def __post_init__(self) -> None:
        for each in fields(self):  # the values may come from a file
            if type(getattr(self, each.name)) is not each.type:
                raise TypeError(f"{each.name} must be {each.type}, got {getattr(self, each.name)!r}")

    @classmethod
    def of(cls, config: Any, weight: Tensor, beside: "ModelIdentity | None" = None) -> Self:
        """Of a model with this HF config and this embedding table [V, D]. Reads the whole table.

        beside: the only one that it will be compared with, if that is known.
        """
        half = weight.dtype == torch.float32 and (beside is None or beside.embedding_dtype == "float16")
        return cls(
            name_or_path=str(getattr(config, "_name_or_path", "")),
            model_type=str(config.model_type),
            vocab_size=weight.shape[0],
            d_model=weight.shape[1],
            embedding_dtype=str(weight.dtype).removeprefix("torch."),
            embedding_sha256=embedding_sha256(weight),
            float16_sha256=embedding_sha256(weight, torch.float16) if half else "",
        )

    def difference(self, other: "ModelIdentity") -> str | None:
        """Why a prompt of this model is none of ``other``'s, or None. Names decide nothing: paths move."""
        for name in ("model_type", "vocab_size", "d_model"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                return f"{name} {mine!r}, not {theirs!r}"
        # A float16 load has rounded twice by the time it is hashed. bfloat16 does not tell what it has rounded to.
        half = "float16" in (self.embedding_dtype, other.embedding_dtype)
        mine, theirs = (each._hash(half) for each in (self, other))
        if mine and theirs and mine != theirs:
            return f"embedding table {mine[:12]}, not {theirs[:12]}"
        return None

    def _hash(self, half: bool) -> str:
        """The table's or, with ``half``, the one that it has after a load in float16; "" if that is unknown."""
        return self.embedding_sha256 if not half or self.embedding_dtype == "float16" else self.float16_sha256


def embedding_sha256(weight: Tensor, dtype: torch.dtype | None = None) -> str:
    """sha256 of the table [V, D] rounded to bf16, so that fp32 and bf16 loads of one checkpoint agree.

    dtype: as it would be after a load in this one.
    """
    dtype = weight.dtype if dtype is None else dtype
    if is_sharded(weight):  # gathering it would wait for all ranks
        raise ValueError(
            "PromptModel: files of prompts name the model by its embedding table, which must be whole, got a sharded "
            "one. Gather state_dict() with full_tensor(), and load it into a PromptModel that is not sharded"
        )
    if weight.is_meta:
        raise ValueError(
            "PromptModel: files of prompts name the model by its embedding table, which has no data (device meta). "
            "Load it without offload"
        )
    if parts_of(weight):
        return _weight_sha256(("", weight))
    hashes = _hashes_of(weight)
    if dtype not in hashes:
        digest = hashlib.sha256(f"{list(weight.shape)}".encode())
        for chunk in weight.detach().split(max(1, _CHUNK_ELEMENTS // weight.shape[1])):
            digest.update(chunk.to(dtype).to(torch.bfloat16).cpu().contiguous().view(torch.int16).numpy())
        hashes[dtype] = digest.hexdigest()
    return hashes[dtype]


class _Table(NamedTuple):
    """A table at one moment, and its hashes by the dtype of the load."""

    stamp: Stamp
    total: int  # which writing through .data changes
    hashes: dict[torch.dtype, str]


# The last ones. Prompts are loaded one by one, and sha256 takes several times as long as it takes to tell that a table
# is as it was.
_KNOWN = 8
_known: list[_Table] = []


def _hashes_of(weight: Tensor) -> dict[torch.dtype, str]:
    """Those known of a table [V, D] as it is now, for others to be put in."""
    total, state = _total(weight), State.of(weight)
    if total is None:
        return {}
    for table in _known:
        if table.total == total and table.stamp.fits(state):
            return table.hashes
    if len(_known) >= _KNOWN:
        _known.clear()
    new = _Table(Stamp(state), total, {})
    _known.append(new)
    return new.hashes


def _total(weight: Tensor) -> int | None:
    """A sum of a table's bits, each word's by its row and its column; None: it lies in no whole words of 64."""
    size = weight.element_size()
    width, rest = divmod(weight.shape[1] * size, 8)
    if rest or weight.storage_offset() * size % 8 or not weight.is_contiguous():
        return None
    words = weight.detach().reshape(-1).view(torch.int64).view(len(weight), width)
    row = torch.arange(1, len(words) + 1, device=words.device)
    column = _ODD * torch.arange(1, width + 1, device=words.device)
    chunk = _CHUNK_WORDS.get(words.device.type, _CHUNK_WORDS["cpu"])
    rows, total = max(1, chunk // width), row.new_zeros(())
    for some, by in zip(words.split(rows), row.split(rows), strict=True):
        # The upper half is mixed into the lower one, as sums modulo 2^64 lose pairs of the uppermost bit.
        mixed = some ^ (some >> 32)
        total += (mixed.sum(1) * by).sum() + (mixed.sum(0) * column).sum()
    return int(total)


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """sha256 of named tensors: names, shapes and fp32 values. Of a prompt's, it tells what a cache was made from."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        values = tensors[name].detach().to("cpu", torch.float32)
        digest.update(f"{name} {list(values.shape)};".encode())
        digest.update(_bytes(values))
    return digest.hexdigest()


def model_sha256(model: Any) -> str:
    """sha256 of what the keys and values of prompts depend on in eval mode.

    That is all weights (names, shapes, dtypes and values), what the config says of the computation, and which adapters
    (LoRA and others of PEFT) are active, merged or scaled. Modules that were changed against their config are not
    asked. Every byte is read, 1 to 2 GB/s for each of a few threads.

    Args:
        model: an HF T5.

    Raises:
        ValueError: a weight has no data (device meta), as under CPU or disk offload.
    """
    computing = {name: getattr(model.config, name, None) for name in _COMPUTING}
    digest = hashlib.sha256(f"{computing!r};{adapters_of(model)!r};".encode())
    # The state dict has what quantised children keep beside their Parameters; tied weights are there several times.
    weights = {
        id(weight): (name, weight)
        for name, weight in reversed(model.state_dict(keep_vars=True).items())
        if isinstance(weight, Tensor)
    }
    # hashlib lets other threads run while it reads, and a GPU's copies wait for nobody.
    with ThreadPoolExecutor(min(_HASHING_THREADS, os.cpu_count() or 1)) as pool:
        for each in pool.map(_weight_sha256, weights.values()):
            digest.update(each.encode())
    return digest.hexdigest()


def _weight_sha256(named: tuple[str, Tensor]) -> str:
    name, weight = named
    if weight.is_meta:
        raise ValueError(
            f"PromptModel: the weight {name!r} has no data (device meta), and a cache file depends on it. Load the "
            "model without offload, or keep keys in memory: cache_prompts"
        )
    digest = hashlib.sha256(f"{name} {list(weight.shape)} {weight.dtype};".encode())
    parts = parts_of(weight)
    if parts:
        for part in parts.items():
            digest.update(_weight_sha256(part).encode())
        return digest.hexdigest()
    for chunk in weight.detach().reshape(-1).split(_CHUNK_ELEMENTS):
        digest.update(_bytes(chunk.cpu().view(torch.uint8)))
    return digest.hexdigest()


def _bytes(values: Tensor) -> Any:
    return values.contiguous().numpy()

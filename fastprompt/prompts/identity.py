# SPDX-License-Identifier: Apache-2.0
"""Which frozen model a prompt was trained for.

A prompt means nothing to another model, and shapes cannot tell: T5 v1.1, its LM-adapted and its FLAN
checkpoints share all of them. The embedding table tells them apart. A cache of keys and values depends on every
weight, so there every weight is asked, by a sample.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor

_CHUNK_ELEMENTS = 1 << 22  # at most 8 MiB of bf16 at a time
_SAMPLES = 256  # of each weight; any training step moves nearly all elements of a weight


@dataclass(frozen=True)
class ModelIdentity:
    """What a prompt file says about its model; ``embedding_dtype`` is the table's when it was hashed."""

    name_or_path: str
    model_type: str
    vocab_size: int
    d_model: int
    embedding_dtype: str
    embedding_sha256: str

    def __post_init__(self) -> None:
        for each in fields(self):  # the values may come from a file
            if type(getattr(self, each.name)) is not each.type:
                raise TypeError(f"{each.name} must be {each.type}, got {getattr(self, each.name)!r}")

    @classmethod
    def of(cls, config: Any, weight: Tensor) -> Self:
        """Of a model with this HF config and this embedding table [V, D]. Reads the whole table."""
        return cls(
            name_or_path=str(getattr(config, "_name_or_path", "")),
            model_type=str(config.model_type),
            vocab_size=weight.shape[0],
            d_model=weight.shape[1],
            embedding_dtype=str(weight.dtype).removeprefix("torch."),
            embedding_sha256=embedding_sha256(weight),
        )

    def difference(self, other: "ModelIdentity") -> str | None:
        """Why a prompt of this model is none of ``other``'s, or None. Names decide nothing: paths move."""
        for name in ("model_type", "vocab_size", "d_model"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                return f"{name} {mine!r}, not {theirs!r}"
        # An fp16 load has rounded twice by the time it is hashed, so it compares with fp16 only.
        comparable = (self.embedding_dtype == "float16") == (other.embedding_dtype == "float16")
        if comparable and self.embedding_sha256 != other.embedding_sha256:
            return f"embedding table {self.embedding_sha256[:12]}, not {other.embedding_sha256[:12]}"
        return None


def embedding_sha256(weight: Tensor) -> str:
    """sha256 of the table [V, D] rounded to bf16, so that fp32 and bf16 loads of one checkpoint agree."""
    digest = hashlib.sha256(f"{list(weight.shape)}".encode())
    for chunk in weight.detach().split(max(1, _CHUNK_ELEMENTS // weight.shape[1])):
        digest.update(chunk.to(torch.bfloat16).cpu().contiguous().view(torch.int16).numpy())
    return digest.hexdigest()


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """sha256 of named tensors: names, shapes and fp32 values. Of a prompt's, it tells what a cache was made from."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        values = tensors[name].detach().to("cpu", torch.float32)
        digest.update(f"{name} {list(values.shape)};".encode())
        digest.update(_bytes(values))
    return digest.hexdigest()


def weights_sha256(weights: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 of a model's named weights: names, shapes, dtypes, and evenly spaced elements of each.

    Args:
        weights: ``model.named_parameters()``. At most 256 elements of each leave its device.
    """
    digest = hashlib.sha256()
    for name, weight in weights:
        flat = weight.detach().reshape(-1)
        step = -(-max(1, len(flat)) // _SAMPLES)
        # To fp64, which holds every float dtype's values exactly.
        digest.update(f"{name} {list(weight.shape)} {weight.dtype};".encode())
        digest.update(_bytes(flat[::step].to("cpu", torch.float64)))
    return digest.hexdigest()


def _bytes(values: Tensor) -> Any:
    return values.contiguous().numpy()

# SPDX-License-Identifier: Apache-2.0
"""Cache files: the keys and values that a model made of one prompt, so that serving starts without computing them.

One safetensors file with any of encoder_k, encoder_v [Le, P, H, K] and decoder_*, cross_* [Ld, P, H, K], keys and
values together, in the model's dtype. Its metadata says which model and which prompt it was made from; with another
model, another dtype or a prompt that was trained on it is refused.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

import fastprompt
from fastprompt.ops._checks import FLOATS
from fastprompt.prompts._safe_files import float_shapes, opened, write_safetensors
from fastprompt.prompts.identity import ModelIdentity, model_sha256, tensors_sha256
from fastprompt.prompts.layout import check_layout

FORMAT, VERSION = "fastprompt.cache", "2"


@dataclass(frozen=True)
class CacheOrigin:
    """What a cache was made from.

    Args:
        model: the model's identity.
        model_sha256: of all that its results depend on.
        prompt_sha256: of the prompt's tensors.
    """

    model: ModelIdentity
    model_sha256: str
    prompt_sha256: str

    @classmethod
    def of(cls, model: Any, identity: ModelIdentity, *prompts: Mapping[str, Tensor]) -> list[Self]:
        """One for each prompt, given as fp32 tensors by name: of an HF model, its identity, and that prompt."""
        whole = model_sha256(model)
        return [cls(identity, whole, tensors_sha256(prompt)) for prompt in prompts]


def cache_path(prompt_path: str | os.PathLike[str]) -> Path:
    """Where the cache of a prompt's file lies: beside it, ``sst2.safetensors`` -> ``sst2.cache.safetensors``."""
    path = Path(prompt_path)
    return path.with_name(f"{path.name.removesuffix('.safetensors')}.cache.safetensors")


def write_cache(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], origin: CacheOrigin) -> None:
    """Write keys and values as one safetensors file. It appears whole or not at all.

    Args:
        path: the file.
        tensors: [layers, P, H, K] by name, all of one float dtype, the model's; any device.
        origin: what they were made from.

    Raises:
        TypeError, ValueError: tensors of other names, shapes or dtypes, or such that are not finite.
    """
    what = "write_cache: the cache"
    check_layout(what, "prefix", "kv", {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if len(dtypes) != 1 or not dtypes <= set(FLOATS):
        raise TypeError(f"{what} must be of one float dtype, got {sorted(str(dtype) for dtype in dtypes)}")
    values = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    for name, tensor in values.items():
        if not tensor.isfinite().all():
            raise ValueError(
                f"{what}: tensor {name!r} has NaN or infinity. Does the model overflow in {tensor.dtype}?"
            )
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "package": fastprompt.__version__,
        "model": json.dumps(asdict(origin.model)),
        "model_sha256": origin.model_sha256,
        "prompt_sha256": origin.prompt_sha256,
    }
    write_safetensors(path, values, metadata)


def read_cache(
    path: str | os.PathLike[str], origin: CacheOrigin, dtype: torch.dtype, sizes: Mapping[str, int]
) -> dict[str, Tensor]:
    """Read the keys and values [layers, P, H, K] by name, on the CPU.

    Args:
        path: the file.
        origin: what they must have been made from.
        dtype: which they must have.
        sizes: of the model, see :meth:`ModelShape.sizes`.

    Raises:
        FileNotFoundError: there is nothing at ``path``.
        ValueError: the cache is of another model, prompt or dtype, or the file is broken.
    """
    source = Path(path)
    if not source.is_file():
        twice = source.name.endswith(".cache.cache.safetensors")
        remedy = ". Give the path of the prompt's file, not its cache's" if twice else ""
        raise FileNotFoundError(f"read_cache: there is no file {source}{remedy}")
    what = f"read_cache: {source}"
    remedy = "Make the cache again: save_cache"
    with opened("read_cache", source) as handle:
        metadata = handle.metadata() or {}
        if metadata.get("format") != FORMAT or metadata.get("version") != VERSION:
            raise ValueError(
                f"{what} must be a {FORMAT} of version {VERSION}, got {metadata.get('format')!r} of version "
                f"{metadata.get('version')!r}. {remedy}"
            )
        shapes = float_shapes(what, handle)
        _check_origin(what, metadata, origin, remedy)
        check_layout(what, "prefix", "kv", shapes, sizes)
        tensors = {}
        for name in shapes:
            tensor = handle.get_tensor(name)
            if tensor.dtype != dtype:
                raise ValueError(f"{what} must hold {dtype}, the model's dtype, got {tensor.dtype}. {remedy}")
            if not tensor.isfinite().all():
                raise ValueError(f"{what}: tensor {name!r} has NaN or infinity. {remedy}")
            tensors[name] = tensor.clone()  # out of the mapped file, which others may cut short
    return tensors


def _check_origin(what: str, metadata: Mapping[str, str], origin: CacheOrigin, remedy: str) -> None:
    try:
        model = ModelIdentity(**json.loads(metadata.get("model", "")))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{what} describes its model unreadably: {error}. {remedy}") from None
    difference = model.difference(origin.model)
    if difference is None and metadata.get("model_sha256") != origin.model_sha256:
        difference = (
            "the embedding table is the same; other weights, their dtype, the config or an adapter differ"
        )
    if difference is not None:
        raise ValueError(f"{what} was made by another model ({model.name_or_path!r}): {difference}. {remedy}")
    if metadata.get("prompt_sha256") != origin.prompt_sha256:
        raise ValueError(
            f"{what} was made from another prompt, or before this one was trained further. {remedy}"
        )

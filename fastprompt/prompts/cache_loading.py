# SPDX-License-Identifier: Apache-2.0
"""Between the keys and values that a PromptModel keeps and cache files, each of which holds those of one prompt."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastprompt._evaluating import evaluating
from fastprompt.prompts.cache_file import CacheOrigin, cache_path, read_cache, write_cache
from fastprompt.prompts.identity import ModelIdentity
from fastprompt.prompts.keyed import Keyed, keyed
from fastprompt.prompts.layout import ModelShape
from fastprompt.prompts.loading import Prompt
from fastprompt.prompts.prefix import PrefixPrompt, sites_of


@torch.no_grad()
def save_cache(path: str | os.PathLike[str], model: Any, identity: ModelIdentity, prompt: Prompt) -> None:
    """Compute the keys of ``prompt``, of kind cached or prefix, and write them beside its file ``path``."""
    prompt = _as_it_is(prompt)
    with evaluating(model):
        found = keyed(model, [prompt])
    tensors = {}
    for site, (keys, (row,)) in found.items():
        for part, layers in (("k", keys.keys), ("v", keys.values)):
            tensors[f"{site}_{part}"] = torch.stack([layer[row, : keys.lens[row]] for layer in layers])
    [origin] = _origins(model, identity, [prompt])
    write_cache(cache_path(path), tensors, origin)


@torch.no_grad()
def load_caches(
    paths: Sequence[str | os.PathLike[str]], model: Any, identity: ModelIdentity, prompts: Sequence[Prompt]
) -> Keyed:
    """The keys that lie beside these prompts' files, side by side.

    Raises:
        FileNotFoundError, ValueError: as :func:`read_cache`; keys for other sites or of another length.
    """
    origins = _origins(model, identity, prompts)
    found = [
        _read(cache_path(path), model, prompt, origin)
        for path, prompt, origin in zip(paths, prompts, origins, strict=True)
    ]
    # To whoever reads them, keys and values are a prefix.
    return keyed(model, [PrefixPrompt(tensors) for tensors in found])


def _as_it_is(prompt: Prompt) -> Prompt:
    """A copy: the file has the keys and the hash of one prompt, whatever another thread writes to it meanwhile."""
    if isinstance(prompt, PrefixPrompt):
        return PrefixPrompt({name: tensor.detach().clone() for name, tensor in prompt.tensors().items()})
    return prompt.detach().clone()


def _read(source: Path, model: Any, prompt: Prompt, origin: CacheOrigin) -> dict[str, Tensor]:
    """The checked tensors of one cache file, where the model is."""
    dtype = model.get_encoder().get_input_embeddings().weight.dtype
    sizes = ModelShape.of(model).sizes() | {"P": len(prompt)}
    tensors = read_cache(source, origin, dtype, sizes)
    found = {name.partition("_")[0] for name in tensors}
    sites = set(sites_of(prompt))
    if found != sites:
        raise ValueError(
            f"read_cache: {source} must hold keys for {sorted(sites)}, as its prompt has them, got {sorted(found)}. "
            "Make the cache again: save_cache"
        )
    return {name: tensor.to(model.device) for name, tensor in tensors.items()}


def _origins(model: Any, identity: ModelIdentity, prompts: Sequence[Prompt]) -> list[CacheOrigin]:
    tensors = [each.tensors() if isinstance(each, PrefixPrompt) else {"prompt": each} for each in prompts]
    return CacheOrigin.of(model, identity, *tensors)

# SPDX-License-Identifier: Apache-2.0
"""The first values of a prefix prompt.

Rows are drawn anew for each layer by the initialiser of a soft prompt, or are the hidden states that given rows have in
the encoder: a prefix of the sites "encoder" and "cross" then computes what a cached prompt of those rows does. The
decoder's self-attention has no such states; its rows are drawn from the vocabulary. Keys and values come from such rows
through the frozen layers, or are zeros.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastprompt._evaluating import evaluating
from fastprompt.prompts.branch import run_branch
from fastprompt.prompts.config import PromptConfig
from fastprompt.prompts.init import initial_prompt
from fastprompt.prompts.prefix import PrefixPrompt
from fastprompt.prompts.seeds import part_seed
from fastprompt.prompts.sites import project, site_layers

TRACED = ("array", "file", "prompt")  # initialisers that give rows [P, D] to trace through the encoder


@torch.no_grad()
def initial_prefix(
    config: PromptConfig, model: Any, tokenizer: Any = None, source: Tensor | PrefixPrompt | None = None
) -> PrefixPrompt:
    """The prefix that ``config`` asks for, on the CPU.

    Args:
        config: of kind "prefix".
        model: the T5.
        tokenizer: the model's HF tokenizer, for ``"labels"`` and ``"text"``.
        source: the prompt that ``init="prompt"`` names: rows [P, D], or a prefix to copy.

    Raises:
        ValueError: as :func:`initial_prompt`, or a source of another length, or a prefix without what is asked for.
    """
    if isinstance(source, PrefixPrompt):
        tensors = _copied(config, model, source)
    else:
        rows = _rows(config, model, tokenizer, source)
        tensors = _projected(model, rows) if config.parameterization == "kv" else rows
    tensors = {
        name: tensor.to("cpu", torch.float32, copy=True).contiguous() for name, tensor in tensors.items()
    }
    return PrefixPrompt(tensors, config.mlp, config.seed)


def _rows(config: PromptConfig, model: Any, tokenizer: Any, source: Tensor | None) -> dict[str, Tensor]:
    """[layers, P, D] for each site."""
    table = model.get_encoder().get_input_embeddings().weight
    soft = replace(config, kind="prepend", sites=None, parameterization=None, mlp=0)
    traced: dict[str, Tensor] = {}
    if config.init in TRACED:
        start = initial_prompt(soft, table, tokenizer) if source is None else source
        with evaluating(model):
            entering, output = run_branch(model, [start.detach().to(table.device)])
        layers = len(site_layers(model, "cross"))
        traced = {"encoder": torch.cat(entering), "cross": output.expand(layers, -1, -1)}
        soft = replace(soft, init="vocab", source=None)
    rows = {}
    for number, site in enumerate(config.sites or ()):
        if site in traced:
            rows[site] = traced[site]
            continue
        seeds = [part_seed(config.seed, number, layer) for layer in range(len(site_layers(model, site)))]
        drawn = [initial_prompt(replace(soft, seed=seed), table, tokenizer) for seed in seeds]
        rows[site] = torch.stack(drawn)
    return rows


def _projected(model: Any, rows: dict[str, Tensor]) -> dict[str, Tensor]:
    """rows [layers, P, D] of each site -> its keys and values [layers, P, H, K]."""
    table = model.get_encoder().get_input_embeddings().weight
    if table.is_meta:
        raise ValueError(
            "PromptConfig: keys and values come from rows through the model's layers, which have no data (device "
            "meta). Load the weights first, or use parameterization='rows'"
        )
    tensors = {}
    for site, stacked in rows.items():
        layers = list(stacked.to(table.device, table.dtype)[:, None].unbind(0))
        keys = project(model, site, layers, [stacked.shape[1]])
        tensors[f"{site}_k"], tensors[f"{site}_v"] = torch.cat(keys.keys), torch.cat(keys.values)
    return tensors


def _copied(config: PromptConfig, model: Any, source: PrefixPrompt) -> dict[str, Tensor]:
    """Another prefix's values; its rows also as keys and values."""
    sites = config.sites or ()
    missing = set(sites) - set(source.sites)
    if missing or (config.parameterization == "rows" and source.parameterization == "kv"):
        raise ValueError(
            f"PromptConfig: source {config.source!r} must be a prefix with sites {list(sites)} as "
            f"{config.parameterization}, got one with {list(source.sites)} as {source.parameterization}. "
            "Keys and values cannot be turned into rows"
        )
    tensors = {name: tensor for name, tensor in source.tensors().items() if name.partition("_")[0] in sites}
    return _projected(model, tensors) if config.parameterization != source.parameterization else tensors

# SPDX-License-Identifier: Apache-2.0
"""The keys and values of prompts that attention layers read beside the tokens' own: kinds cached and prefix.

They are computed once for a batch, not once per example: [R, P, H, K] per layer for the R prompts in use, and for each
example the number of its prompt. Their gradient is summed over the batch where they are read.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from fastprompt._allowed import PromptKeys
from fastprompt.ops._indices import indices
from fastprompt.prompts.branch import run_branch
from fastprompt.prompts.config import SITES
from fastprompt.prompts.prefix import PrefixPrompt
from fastprompt.prompts.sites import Keys, bias_tables, project, site_layers


class SiteKeys(NamedTuple):
    """The keys of several prompts in one site."""

    keys: Keys
    rows: tuple[int, ...]  # of each prompt, its index among the R of ``keys``


Keyed = dict[str, SiteKeys]  # by site; a site that no prompt has is left out
Part = tuple[Keys, dict[int, int]]  # keys of some of the prompts: prompt -> row


def keyed(model: Any, prompts: Sequence[Tensor | PrefixPrompt]) -> Keyed:
    """The keys of prompts: a tensor [P, D] is of kind cached, the rest is prefix. With gradient, if that is on."""
    parts: dict[str, list[Part]] = {site: [] for site in SITES}
    cached = {i: prompt for i, prompt in enumerate(prompts) if isinstance(prompt, Tensor)}
    if cached:
        for site, keys in _of_cached(model, list(cached.values())).items():
            parts[site].append((keys, _numbered(cached)))
    tensors = {i: prompt.tensors() for i, prompt in enumerate(prompts) if isinstance(prompt, PrefixPrompt)}
    for each in tensors.values():
        _check_layers(model, each)
    for site in SITES:
        rows = {i: each[site] for i, each in tensors.items() if site in each}
        if rows:
            parts[site].append((_of_rows(model, site, list(rows.values())), _numbered(rows)))
        pairs = {
            i: (each[f"{site}_k"], each[f"{site}_v"]) for i, each in tensors.items() if f"{site}_k" in each
        }
        if pairs:
            parts[site].append((_of_pairs(model, list(pairs.values())), _numbered(pairs)))
    return {site: joined(each, len(prompts)) for site, each in parts.items() if each}


def _check_layers(model: Any, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        site = name.partition("_")[0]
        layers = len(site_layers(model, site))
        if len(tensor) != layers:
            raise ValueError(
                f"PromptModel: a prefix must have keys for the {layers} {site} layers of the model, got "
                f"{len(tensor)}. Make one for the model as it is now"
            )


def _of_cached(model: Any, prompts: Sequence[Tensor]) -> dict[str, Keys]:
    """[P_i, D] each."""
    lens = [len(prompt) for prompt in prompts]
    entering, output = run_branch(model, prompts)
    beside_output = [output] * len(model.get_decoder().block)
    return {
        "encoder": project(model, "encoder", entering, lens),
        "cross": project(model, "cross", beside_output, lens),
    }


def _of_rows(model: Any, site: str, rows: Sequence[Tensor]) -> Keys:
    """[layers, P_i, D] each."""
    lens = [each.shape[1] for each in rows]
    return project(model, site, _stacked(rows, model.get_encoder().get_input_embeddings().weight.dtype), lens)


def _of_pairs(model: Any, pairs: Sequence[tuple[Tensor, Tensor]]) -> Keys:
    """Keys and values [layers, P_i, H, K] each."""
    keys, values = (tuple(_stacked(each, _projection_dtype(model))) for each in zip(*pairs, strict=True))
    return Keys(keys, values, tuple(each.shape[1] for each, _ in pairs))


def _numbered(prompts: Mapping[int, Any]) -> dict[int, int]:
    return {i: row for row, i in enumerate(prompts)}


def joined(parts: Sequence[Part], count: int) -> SiteKeys:
    """The keys of prompts 0 to count - 1 in one site. One that is in no part has no keys there: a row of length 0."""
    missing = count > sum(len(rows) for _, rows in parts)
    if len(parts) == 1 and not missing:
        keys, rows = parts[0]
        return SiteKeys(keys, tuple(rows[i] for i in range(count)))
    where: dict[int, int] = {}
    lens: list[int] = []
    for keys, rows in parts:
        where |= {i: len(lens) + number for number, i in enumerate(rows)}
        lens += [keys.lens[row] for row in rows.values()]
    longest = max(lens)

    def layer(tensors: Sequence[Tensor]) -> Tensor:
        taken = []
        for tensor, (_, rows) in zip(tensors, parts, strict=True):
            some = tensor[list(rows.values()), :longest]
            taken.append(functional.pad(some, (0, 0, 0, 0, 0, longest - some.shape[1])))
        if missing:
            taken.append(torch.zeros_like(taken[0][:1]))
        return torch.cat(taken)

    every = Keys(
        tuple(map(layer, zip(*(keys.keys for keys, _ in parts), strict=True))),
        tuple(map(layer, zip(*(keys.values for keys, _ in parts), strict=True))),
        (*lens, 0) if missing else tuple(lens),
    )
    return SiteKeys(every, tuple(where.get(i, len(lens)) for i in range(count)))


def to_read(
    model: Any, site: str, found: SiteKeys | None, ids: Sequence[int] | None, batch: int
) -> PromptKeys | None:
    """What attention layers read: ``ids`` says which of the prompts each of a ``batch`` takes; None: the first."""
    if found is None:
        return None
    (keys, values, lens), device = found.keys, found.keys.keys[0].device
    many, ragged = len(lens) > 1, min(lens) < keys[0].shape[1]
    return PromptKeys(
        keys,
        values,
        indices([found.rows[i] for i in ids or [0] * batch], device) if many else None,
        indices(lens, device) if ragged else None,
        bias_tables(model, site),
    )


def _projection_dtype(model: Any) -> torch.dtype:
    """Of what a layer's k and v projections give."""
    table = model.get_encoder().get_input_embeddings().weight
    if torch.is_autocast_enabled(table.device.type):
        return torch.get_autocast_dtype(table.device.type)
    return table.dtype


def _stacked(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """R tensors [L, P_i, ...] -> for each of the L layers [R, P, ...], P the longest."""
    if len(tensors) == 1:
        tensor, recorded = tensors[0], torch.is_grad_enabled()
        if tensor.requires_grad and not recorded:  # as views of a Parameter would, which have none here
            tensor = tensor.detach()
        # A copy of what is learned, so that an optimiser may write to it before a backward pass of earlier calls.
        return list(tensor.to(dtype, copy=tensor.requires_grad and recorded)[:, None].unbind(0))
    by_position = pad_sequence([tensor.to(dtype).transpose(0, 1) for tensor in tensors], batch_first=True)
    return list(by_position.transpose(1, 2).unbind(1))

# SPDX-License-Identifier: Apache-2.0
"""Attention sites: where in a T5 a prompt can have keys and values of its own, and how its rows become such.

    site      keys and values of layer i                          bias of prompt key p of P, for query i
    encoder   k(norm(row)), v(norm(row)), as of a token           of distance p - P - i: it stands before the tokens
    decoder   the same                                            of distance p - P - i: an earlier decoder position
    cross     k(row), v(row), as of an encoder output             none

The layers' children are called as modules, so LoRA, quantised and hooked ones do what they do for tokens.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastprompt import hf_attention
from fastprompt.modules._bias import bias_obstacle, bias_table
from fastprompt.modules.config import give_config, served_config
from fastprompt.prompts.config import SITES


class Layer(NamedTuple):
    """An attention layer of a T5."""

    norm: nn.Module | None  # what rows pass before k and v; None: nothing
    attention: Any  # T5Attention: k, v, n_heads, key_value_proj_dim

    def project(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """rows [..., P, D] -> keys, values [..., P, H, K]."""
        normed = rows if self.norm is None else self.norm(rows)
        heads = (self.attention.n_heads, self.attention.key_value_proj_dim)
        return tuple(child(normed).unflatten(-1, heads) for child in (self.attention.k, self.attention.v))  # type: ignore[return-value]


class Keys(NamedTuple):
    """Keys and values of R prompts in one site."""

    keys: tuple[Tensor, ...]  # one [R, P, H, K] per layer
    values: tuple[Tensor, ...]
    lens: tuple[int, ...]  # R: how many of the P are the prompt's; the rest is filling


def site_layers(model: Any, site: str) -> list[Layer]:
    """The layers of a site, first to last, looked up for less than nn.Module's own lookup takes."""
    stack = model.get_encoder() if site == "encoder" else model.get_decoder()
    if site == "cross":
        others = [block._modules["layer"]._modules["1"]._modules for block in stack.block]
        return [Layer(None, each["EncDecAttention"]) for each in others]
    own = [block._modules["layer"]._modules["0"]._modules for block in stack.block]
    return [Layer(each["layer_norm"], each["SelfAttention"]) for each in own]


def project(model: Any, site: str, rows: Sequence[Tensor], lens: Sequence[int]) -> Keys:
    """The keys of a site from one tensor of rows [R, P, D] per layer."""
    pairs = [layer.project(each) for layer, each in zip(site_layers(model, site), rows, strict=True)]
    return Keys(tuple(k for k, _ in pairs), tuple(v for _, v in pairs), tuple(lens))


def bias_tables(model: Any, site: str) -> Tensor | tuple[Tensor, ...] | None:
    """The site's bias by distance, [H, 2M + 1]; one per layer where each has its own (UMT5)."""
    if site == "cross":
        return None
    tables = []
    for _, attention in site_layers(model, site):
        if attention.has_relative_attention_bias:
            found = bias_obstacle(attention)
            if found is not None:
                raise ValueError(
                    f"PromptModel: prompts with keys of their own need the {site}'s bias as a table by distance, but"
                    f" its {found}. Call model.requires_grad_(False) if it is trained, or use kind='prepend'"
                )
            tables.append(bias_table(attention))
    return tables[0] if len(tables) == 1 else tuple(tables)


def disorder(model: Any, site: str) -> str | None:
    """What a site's layers should be and are not; None if they are.

    A layer finds its prompts' keys, its bias and its cache by its number, and T5's first layer has the bias of all.
    """
    layers = [layer.attention for layer in site_layers(model, site)]
    numbers, every = [layer.layer_idx for layer in layers], list(range(len(layers)))
    biased = [i for i, layer in enumerate(layers) if layer.has_relative_attention_bias]
    expected = [] if site == "cross" else every if model.config.model_type == "umt5" else every[:1]
    if numbers == every and biased == expected:
        return None
    return (
        f"the blocks that transformers made, in that order, got {site} layers with layer_idx {numbers} and a bias in "
        f"those at {biased}"
    )


def serve(model: Any) -> None:
    """Let both stacks attend by "fastprompt", which knows of prompt keys and otherwise computes the same.

    Asked before each call: unpatch and set_attn_implementation may have chosen another, and blocks may have come or
    gone.

    Raises:
        ValueError: the layers are not numbered as their keys are, or torch.export is recording.
    """
    # PyTorch 2.11 answers the first question with yes in torch.compile, too.
    if torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling():
        raise ValueError(
            "PromptModel: torch.export takes prompts of kind 'prepend' alone. Use kind='prepend'"
        )
    for site in SITES:
        found = disorder(model, site)
        if found is not None:
            raise ValueError(
                f"PromptModel: prompts of kind 'cached' and 'prefix' need {found}. Set each layer_idx anew, or use "
                "kind='prepend'"
            )
    for stack, sites in ((model.get_encoder(), SITES[:1]), (model.get_decoder(), SITES[1:])):
        own = (layer.attention.config for site in sites for layer in site_layers(model, site))
        configs = [stack.config, *own]
        several = {id(config): config for config in configs}.values()
        if any(config._attn_implementation_internal != hf_attention.NAME for config in several):
            give_config(stack, served_config(stack.config))

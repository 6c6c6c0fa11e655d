# SPDX-License-Identifier: Apache-2.0
"""Packed execution: the encoder runs on the rows of a batch that are real, one example after the other.

They enter as [N, 1, D], N examples of one row for all that works row by row. Attention layers alone know better, from
``Allowed.cu``: positions, and with them the bias, begin anew in each example. (As [1, N, D], transformers
would make a bias of N x N.) Behind the encoder the rows are padded again, with zeros: [B, L, D].

An example's tokens must stand at its beginning. Padding before or among them is part of the distances between rows,
which packing would change.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from fastprompt import hf_attention
from fastprompt._allowed import Allowed, PromptKeys
from fastprompt._extra_outputs import extra_output
from fastprompt._family import SERVED
from fastprompt.dispatch.plain import is_capturing, is_transformed
from fastprompt.modules._bias import bias_obstacle
from fastprompt.modules._ready import head_obstacle
from fastprompt.ops._indices import indices
from fastprompt.prompts import stock
from fastprompt.prompts.sites import bias_tables, disorder


class Packing(NamedTuple):
    """Which rows of a padded batch are real: the first ones of each example."""

    tokens: list[int]  # how many of the S tokens of each example
    rows: list[int]  # how many of the L rows: its prompt's and its tokens
    S: int
    L: int
    device: torch.device

    def token_ids(self, input_ids: Tensor) -> Tensor:
        """[B, S] -> [sum of tokens]."""
        return input_ids.flatten()[_places(self.tokens, self.S, self.device)]

    def keys(self, model: Any, prompt: PromptKeys | None = None) -> Allowed:
        """What goes into the encoder as its attention_mask."""
        bias = bias_tables(model, "encoder") if prompt is None else None
        return Allowed(None, 0, False, prompt, starts(self.rows, self.device), bias)

    def padded(self, hidden: Tensor) -> Tensor:
        """[N, 1, D] -> [B, L, D], zeros where there is no row."""
        B, D = len(self.rows), hidden.shape[-1]
        places = _places(self.rows, self.L, self.device)
        return hidden.new_zeros(B * self.L, D).index_copy_(0, places, hidden[:, 0]).view(B, self.L, D)


def starts(lens: Sequence[int], device: torch.device) -> Tensor:
    """[B + 1] int64: where each example begins, and the end."""
    return indices([0, *accumulate(lens)], device)


def _places(lens: Sequence[int], width: int, device: torch.device) -> Tensor:
    """[sum of lens] int64: the first lens[b] of each example among all B * width."""
    gaps = [b * width - begin for b, begin in enumerate(accumulate(lens[:-1], initial=0))]
    before, counts = indices([gaps, lens], device)  # all places from the host would have to be waited for
    N = sum(lens)
    return torch.arange(N, device=device) + before.repeat_interleave(counts, output_size=N)


def packing(
    model: Any,
    mask: Tensor | None,
    shape: Sequence[int],
    lengths: Sequence[int],
    pack: bool | None,
    flags: Mapping[str, Any],
    device: torch.device,
) -> Packing | None:
    """How to pack a batch; None to run it padded.

    Args:
        mask: [B, S], of the tokens. On a GPU the host waits for it.
        shape: B, S.
        lengths: how many rows each example's prompt has in the encoder; one number: of all.
        pack: None: if that saves rows and is possible; True: ValueError if it is not.
        flags: output_attentions, output_hidden_states, where given.

    A compiler, a tracer and torch.func get no packing: shapes would depend on data, and operations be others.
    """
    (B, S), longest = shape, max(lengths)
    ragged = mask is not None or min(lengths) < longest
    if pack is False or (pack is None and not ragged) or _is_traced(device):
        return None
    why, tokens, rows = obstacle(model, flags, device), None, []
    if why is None:
        tokens = [S] * B if mask is None else token_counts(mask)
        if tokens is None:
            why = (
                "needs an attention_mask with padding behind an example's tokens, got some before or among them. "
                "Use padding_side='right'"
            )
        else:
            each = lengths if len(lengths) == B else [longest] * B
            rows = [length + count for length, count in zip(each, tokens, strict=True)]
            if min(rows) == 0:
                why = f"needs one row or more in each example, got none in example {rows.index(0)}"
    if why is not None or tokens is None:
        if pack:
            raise ValueError(f"PromptModel: pack=True {why}. pack=None runs such a batch padded")
        return None
    if pack is None and sum(rows) == B * (longest + S):
        return None
    return Packing(tokens, rows, S, longest + S, device)


def _is_traced(device: torch.device) -> bool:
    if torch.compiler.is_compiling() or is_transformed() or is_capturing(device):
        return True
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None  # torch.fx's make_fx


def token_counts(mask: Tensor) -> list[int] | None:
    """How many tokens each row of the mask [B, S] has; None if padding stands before one."""
    real = mask.ne(0)
    late = (real[:, 1:] & ~real[:, :-1]).any()
    *counts, broken = torch.cat((real.sum(1), late[None])).tolist()
    return None if broken else counts


def encode(model: Any, rows: Tensor, packing: Packing, prompt: PromptKeys | None = None) -> BaseModelOutput:
    """The encoder over rows [N, D], which attend to the prompt's keys too, and its output padded again: [B, L, D]."""
    encoder = encoder_of(model)
    output = encoder(
        inputs_embeds=rows[:, None], attention_mask=packing.keys(model, prompt), return_dict=True
    )
    output.last_hidden_state = packing.padded(output.last_hidden_state)
    return output


def encoder_of(model: Any) -> Any:
    """The encoder that packed rows enter: the model's, or a view of it where it attends by another function."""
    encoder = model.get_encoder()
    return encoder if _serves(encoder) else stock.attending(encoder)


def _serves(encoder: Any) -> bool:
    return bool(encoder.config._attn_implementation_internal == hf_attention.NAME)


def obstacle(model: Any, flags: Mapping[str, Any], device: torch.device) -> str | None:
    """Why this model's encoder cannot run packed rows; None if it can."""
    if model.config.model_type not in SERVED:
        return f"needs a model of type {', '.join(SERVED)}, got {model.config.model_type!r}"
    encoder = model.get_encoder()
    found = None if _serves(encoder) else stock.obstacle(encoder, device)
    if found is not None:
        return found
    if (asked := extra_output(flags, encoder.config)) is not None:
        return f"does not go with {asked}"
    found = disorder(model, "encoder")
    if found is not None:
        return f"needs {found}"
    for i, block in enumerate(encoder.block):
        attention = block.layer[0].SelfAttention
        found = head_obstacle(attention)
        if found is None and attention.has_relative_attention_bias:
            offloaded = attention.relative_attention_bias.weight.is_meta
            found = "relative_attention_bias.weight is offloaded" if offloaded else bias_obstacle(attention)
        if found is not None:
            return f"does not go with block.{i}'s attention: {found}"
    return None

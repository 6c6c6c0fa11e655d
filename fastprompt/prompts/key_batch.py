# SPDX-License-Identifier: Apache-2.0
"""A batch whose prompts are keys and values that attention layers read: kinds "cached" and "prefix"."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from fastprompt import hf_attention
from fastprompt.hf_attention import PromptKeys
from fastprompt.prompts import checks, packed
from fastprompt.prompts.packed_encoder import encode_packed
from fastprompt.prompts.reentrant import gathered, is_reentrant


class KeyBatch(NamedTuple):
    """A call's tokens, and the keys and values that they attend to beside each other's."""

    model: Any
    table: Tensor  # the encoder's embedding table [V, D]
    input_ids: Any  # [B, S]
    attention_mask: Tensor | None  # [B, S], 0 where a token is padding
    pack: bool | None  # as PromptModel has it
    keys: Mapping[str, PromptKeys | None]  # the prompts', by site

    def encode(self, flags: dict[str, Any]) -> BaseModelOutput:
        """The encoder over the tokens alone: [B, S, D]. ``flags``: output_attentions and others, where given."""
        ids, encoder, prompt = self.input_ids, self.model.get_encoder(), self.keys["encoder"]
        self._check_mask(ids)
        checks.check_ids(ids, self.table)
        layout = packed.layout(
            self.model, self.attention_mask, ids.shape, [0] * len(ids), self.pack, flags, self.table.device
        )
        embeds = encoder.get_input_embeddings()(ids if layout is None else layout.token_ids(ids))
        if torch.is_grad_enabled() and is_reentrant(encoder):
            embeds, (prompt,) = _as_leaves(embeds, prompt)
        if layout is not None:
            return encode_packed(self.model, embeds, layout, prompt)
        mask = hf_attention.Keys(_as_bool(self.attention_mask), 0, False, prompt)
        return encoder(inputs_embeds=embeds, attention_mask=mask, return_dict=True, **flags)

    def forward(self, encoder_outputs: Any, arguments: dict[str, Any]) -> Any:
        """The model's forward on what ``encode`` gave. ``arguments`` are its own to change."""
        self._check_mask(encoder_outputs[0])
        decoder, cross = self.keys["decoder"], self.keys["cross"]
        if arguments.get("past_key_values") is not None:
            # Where the queries stand among the keys is for transformers to say.
            with hf_attention.prompt_keys(self.model, decoder=decoder, cross=cross):
                return self.model(
                    attention_mask=self.attention_mask, encoder_outputs=encoder_outputs, **arguments
                )
        if torch.is_grad_enabled() and is_reentrant(self.model.get_decoder()):
            embeds = self._take_decoder_embeds(arguments)
            if embeds is not None:
                arguments["decoder_inputs_embeds"], (decoder, cross) = _as_leaves(embeds, decoder, cross)
        arguments["decoder_attention_mask"] = hf_attention.Keys(
            _as_bool(arguments["decoder_attention_mask"]), 0, True, decoder
        )
        mask = hf_attention.Keys(_as_bool(self.attention_mask), 0, False, cross)
        return self.model(attention_mask=mask, encoder_outputs=encoder_outputs, **arguments)

    def generate(self, encoder_outputs: Any, arguments: Mapping[str, Any]) -> Any:
        """The model's ``generate`` on what ``encode`` gave."""
        hidden, mask = encoder_outputs[0], self.attention_mask
        self._check_mask(hidden)
        if mask is None:  # generate would guess one from padding ids
            mask = torch.ones(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
        with hf_attention.prompt_keys(self.model, decoder=self.keys["decoder"], cross=self.keys["cross"]):
            return self.model.generate(
                self.input_ids, attention_mask=mask, encoder_outputs=encoder_outputs, **arguments
            )

    def _check_mask(self, rows: Tensor) -> None:
        """``rows``: the tokens' ids [B, S] or hidden states [B, S, D]."""
        checks.check_mask(self.attention_mask, len(rows), rows.shape[1], self.table)

    def _take_decoder_embeds(self, arguments: dict[str, Any]) -> Tensor | None:
        """The decoder's input, in place of its ids; None if neither is given, which HF refuses."""
        if arguments.get("decoder_inputs_embeds") is not None:
            return arguments["decoder_inputs_embeds"]
        ids, labels = arguments.pop("decoder_input_ids"), arguments["labels"]
        if ids is None and labels is not None:
            ids = self.model.prepare_decoder_input_ids_from_labels(labels)
        return None if ids is None else self.model.get_decoder().get_input_embeddings()(ids)


def _as_bool(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.ne(0)


def _as_leaves(embeds: Tensor, *sites: PromptKeys | None) -> tuple[Tensor, list[PromptKeys | None]]:
    """The stack's input and its prompt keys, made ready for reentrant checkpoints."""
    tensors = [tensor for site in sites if site is not None for tensor in (*site.keys, *site.values)]
    if not tensors:
        return embeds, list(sites)
    embeds, leaves = gathered(embeds, tensors)
    found: list[PromptKeys | None] = []
    for site in sites:
        if site is None:
            found.append(None)
            continue
        layers = len(site.keys)
        keys, values, leaves = leaves[:layers], leaves[layers : 2 * layers], leaves[2 * layers :]
        found.append(site._replace(keys=tuple(keys), values=tuple(values)))
    return embeds, found

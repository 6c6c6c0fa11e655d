# SPDX-License-Identifier: Apache-2.0
"""A batch whose prompts are keys and values that attention layers read: kinds "cached" and "prefix"."""

from collections.abc import Mapping
from copy import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from fastprompt import hf_attention
from fastprompt._allowed import Allowed, PromptKeys
from fastprompt._cache_name import CACHE
from fastprompt.modules.config import served_config
from fastprompt.prompts import checks, packed
from fastprompt.prompts.reentrant import as_leaves, is_reentrant
from fastprompt.prompts.tokens import Tokens


class KeyBatch(NamedTuple):
    """A call's tokens, and the keys and values that they attend to beside each other's."""

    tokens: Tokens
    keys: Mapping[str, PromptKeys | None]  # the prompts', by site

    def encode(self, flags: dict[str, Any]) -> BaseModelOutput:
        """The encoder over the tokens alone: [B, S, D]. ``flags``: output_attentions and others, where given."""
        model, table, ids, mask, _ = self.tokens
        encoder, prompt = model.get_encoder(), self.keys["encoder"]
        self.tokens.check_mask(ids)
        checks.check_ids(ids, table)
        packing = self.tokens.packing([0], flags)
        embeds = encoder.get_input_embeddings()(ids if packing is None else packing.token_ids(ids))
        if torch.is_grad_enabled() and is_reentrant(encoder):
            embeds, (prompt,) = as_leaves(embeds, prompt)
        if packing is not None:
            return packed.encode(model, embeds, packing, prompt)
        keys = Allowed(_as_bool(mask), 0, False, prompt)
        return encoder(inputs_embeds=embeds, attention_mask=keys, return_dict=True, **flags)

    def forward(self, encoder_outputs: Any, arguments: dict[str, Any]) -> Any:
        """The model's forward on what ``encode`` gave. ``arguments`` are its own to change."""
        model, mask = self.tokens.model, self.tokens.mask
        self.tokens.check_mask(encoder_outputs[0])
        decoder, cross = self.keys["decoder"], self.keys["cross"]
        if arguments.get(CACHE) is not None or not checks.has_whole_mask(arguments):
            # Where the queries stand among the keys, and what other masks mean, is for transformers to say.
            with hf_attention.prompt_keys(model, decoder=decoder, cross=cross):
                return model(attention_mask=mask, encoder_outputs=encoder_outputs, **arguments)
        if torch.is_grad_enabled() and is_reentrant(model.get_decoder()):
            embeds = self._take_decoder_embeds(arguments)
            if embeds is not None:
                arguments["decoder_inputs_embeds"], (decoder, cross) = as_leaves(embeds, decoder, cross)
        arguments["decoder_attention_mask"] = Allowed(
            _as_bool(arguments.get("decoder_attention_mask")), 0, True, decoder
        )
        keys = Allowed(_as_bool(mask), 0, False, cross)
        return model(attention_mask=keys, encoder_outputs=encoder_outputs, **arguments)

    def generate(self, encoder_outputs: Any, arguments: Mapping[str, Any]) -> Any:
        """The model's ``generate`` on what ``encode`` gave."""
        model, _, ids, mask, _ = self.tokens
        hidden = encoder_outputs[0]
        self.tokens.check_mask(hidden)
        if mask is None:  # generate would guess one from padding ids
            mask = torch.ones(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
        # For a static cache generate makes the decoder's mask itself, by the attention that its model's config names.
        view = copy(model)
        view.config = served_config(model.config)
        with hf_attention.prompt_keys(view, decoder=self.keys["decoder"], cross=self.keys["cross"]):
            return view.generate(ids, attention_mask=mask, encoder_outputs=encoder_outputs, **arguments)

    def _take_decoder_embeds(self, arguments: dict[str, Any]) -> Tensor | None:
        """The decoder's input, in place of its ids; None if neither is given, which HF refuses."""
        if arguments.get("decoder_inputs_embeds") is not None:
            return arguments["decoder_inputs_embeds"]
        ids, labels = arguments.pop("decoder_input_ids", None), arguments.get("labels")
        model = self.tokens.model
        if ids is None and labels is not None:
            ids = model.prepare_decoder_input_ids_from_labels(labels)
        return None if ids is None else model.get_decoder().get_input_embeddings()(ids)


def _as_bool(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.ne(0)

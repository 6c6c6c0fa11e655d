# SPDX-License-Identifier: Apache-2.0
"""A batch whose prompts are rows of the encoder's input: kind "prepend"."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from fastprompt import hf_attention
from fastprompt.ops.prompt_embed import prompt_embed
from fastprompt.prompts import checks, packed
from fastprompt.prompts.bank import Choice
from fastprompt.prompts.mask import prepend_mask
from fastprompt.prompts.packed_encoder import encode_packed
from fastprompt.prompts.row_gradient import mark_prompt_rows


class RowBatch(NamedTuple):
    """A call's tokens and the prompts of its rows: row b enters the encoder as [its prompt | its tokens]."""

    model: Any
    table: Tensor  # the encoder's embedding table [V, D]
    input_ids: Any  # [B, S]
    attention_mask: Tensor | None  # [B, S], 0 where a token is padding
    pack: bool | None  # as PromptModel has it
    choice: Choice

    def encode(self, flags: dict[str, Any]) -> BaseModelOutput:
        """The encoder over [prompt | tokens]: [B, L, D]. ``flags``: output_attentions and others, where given."""
        ids, table, choice = self.input_ids, self.table, self.choice
        encoder, S = self.model.get_encoder(), ids.shape[1]
        checks.check_embedding(encoder.get_input_embeddings())
        checks.check_mask(self.attention_mask, len(ids), S, table)
        layout = packed.layout(
            self.model, self.attention_mask, ids.shape, choice.lengths, self.pack, flags, table.device
        )
        if layout is not None:
            begins = packed.starts(layout.tokens, table.device)
            rows, _ = prompt_embed(
                layout.token_ids(ids), table, choice.prompts, choice.ids, cu_seqlens=begins
            )
            return encode_packed(self.model, rows, layout)
        embeds = prompt_embed(ids, table, choice.prompts, choice.ids)
        mask = prepend_mask(self.attention_mask, choice.lengths, S, table.device)
        assert isinstance(embeds, Tensor)  # it is a pair for packed ids only
        mark_prompt_rows(embeds, encoder, max(choice.lengths), flags)
        return encoder(inputs_embeds=embeds, attention_mask=mask, return_dict=True, **flags)

    def forward(self, encoder_outputs: Any, arguments: Mapping[str, Any]) -> Any:
        """The model's forward on what ``encode`` gave."""
        mask = self._cross_mask(encoder_outputs[0])
        with hf_attention.no_prompt_keys(self.model):
            return self.model(attention_mask=mask, encoder_outputs=encoder_outputs, **arguments)

    def generate(self, encoder_outputs: Any, arguments: Mapping[str, Any]) -> Any:
        """The model's ``generate`` on what ``encode`` gave."""
        mask = self._cross_mask(encoder_outputs[0])
        # Given inputs_embeds instead, HF has no token ids for encoder_no_repeat_ngram_size and
        # encoder_repetition_penalty, and ignores them.
        with hf_attention.no_prompt_keys(self.model):
            return self.model.generate(
                self.input_ids, attention_mask=mask, encoder_outputs=encoder_outputs, **arguments
            )

    def _cross_mask(self, hidden: Tensor) -> Tensor | None:
        """The mask [B, L] for encoder outputs [B, L, D], from the tokens' [B, S]; one of [B, L] stays."""
        batch, length = hidden.shape[:2]
        mask, longest = self.attention_mask, max(self.choice.lengths)
        if mask is not None and tuple(mask.shape) == (batch, length):
            return mask
        num_tokens = length - longest
        if num_tokens < 0:
            raise ValueError(
                f"PromptModel: encoder_outputs must have at least the prompt's {longest} positions, "
                f"got {length}. Give those of a PromptModel with the same prompts"
            )
        checks.check_mask(mask, batch, num_tokens, self.table)
        return prepend_mask(mask, self.choice.lengths, num_tokens, hidden.device)

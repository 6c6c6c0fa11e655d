# SPDX-License-Identifier: Apache-2.0
"""A batch whose prompts are rows of the encoder's input: kind "prepend"."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers.modeling_outputs import BaseModelOutput

from fastprompt import hf_attention
from fastprompt.dispatch.plain import is_transformed
from fastprompt.ops.prompt_embed import prompt_embed
from fastprompt.prompts import checks, packed
from fastprompt.prompts.bank import Selection
from fastprompt.prompts.mask import prepend_mask
from fastprompt.prompts.row_gradient import mark_prompt_rows
from fastprompt.prompts.tokens import Tokens


class RowBatch(NamedTuple):
    """A call's tokens and the prompts of its rows: row b enters the encoder as [its prompt | its tokens]."""

    tokens: Tokens
    selection: Selection

    def encode(self, flags: dict[str, Any]) -> BaseModelOutput:
        """The encoder over [prompt | tokens]: [B, L, D]. ``flags``: output_attentions and others, where given."""
        (model, table, ids, mask, _), selection = self
        encoder = model.get_encoder()
        checks.check_embedding(encoder.get_input_embeddings())
        self.tokens.check_mask(ids)
        packing = self.tokens.packing(selection.lengths, flags)
        if packing is not None:
            begins = packed.starts(packing.tokens, table.device)
            rows, _ = prompt_embed(
                packing.token_ids(ids), table, selection.prompts, selection.ids, cu_seqlens=begins
            )
            return packed.encode(model, rows, packing)
        rows_of = _plain_rows if is_transformed() else prompt_embed
        embeds = rows_of(ids, table, selection.prompts, selection.ids)
        mask = prepend_mask(mask, selection.lengths, ids.shape[1], table.device)
        assert isinstance(embeds, Tensor)  # it is a pair for packed ids only
        mark_prompt_rows(embeds, encoder, max(selection.lengths), flags)
        return encoder(inputs_embeds=embeds, attention_mask=mask, return_dict=True, **flags)

    def forward(self, encoder_outputs: Any, arguments: Mapping[str, Any]) -> Any:
        """The model's forward on what ``encode`` gave."""
        model, mask = self.tokens.model, self._cross_mask(encoder_outputs[0])
        with hf_attention.no_prompt_keys(model):
            return model(attention_mask=mask, encoder_outputs=encoder_outputs, **arguments)

    def generate(self, encoder_outputs: Any, arguments: Mapping[str, Any]) -> Any:
        """The model's ``generate`` on what ``encode`` gave."""
        model, mask = self.tokens.model, self._cross_mask(encoder_outputs[0])
        # Given inputs_embeds instead, HF has no token ids for encoder_no_repeat_ngram_size and
        # encoder_repetition_penalty, and ignores them.
        with hf_attention.no_prompt_keys(model):
            return model.generate(
                self.tokens.ids, attention_mask=mask, encoder_outputs=encoder_outputs, **arguments
            )

    def _cross_mask(self, hidden: Tensor) -> Tensor | None:
        """The mask [B, L] for encoder outputs [B, L, D], from the tokens' [B, S]."""
        batch, length = hidden.shape[:2]
        mask, longest = self.tokens.mask, max(self.selection.lengths)
        tokens = mask if mask is not None else self.tokens.ids  # which need not be there
        num_tokens = tokens.shape[-1] if isinstance(tokens, Tensor) else max(length - longest, 0)
        if length != longest + num_tokens:
            raise ValueError(
                f"PromptModel: encoder_outputs must have {longest} positions of the prompt and {num_tokens} of tokens, "
                f"got {length}. Give what encode() returns for the same prompts and tokens"
            )
        checks.check_mask(mask, batch, num_tokens, self.tokens.table)
        return prepend_mask(mask, self.selection.lengths, num_tokens, hidden.device)


def _plain_rows(ids: Tensor, table: Tensor, prompts: list[Tensor], prompt_ids: list[int] | None) -> Tensor:
    """What prompt_embed gives, by operators of PyTorch: a trace of these serves inputs of other sizes, too."""
    tokens = functional.embedding(ids, table)
    rows = [prompt.to(table.dtype) for prompt in prompts]
    if prompt_ids is None:
        return torch.cat((rows[0].expand(ids.shape[0], -1, -1), tokens), 1)
    return pad_sequence(
        [torch.cat((rows[i], own)) for i, own in zip(prompt_ids, tokens, strict=True)], batch_first=True
    )

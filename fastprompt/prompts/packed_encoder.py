# SPDX-License-Identifier: Apache-2.0
"""The encoder's call on packed rows."""

from typing import Any

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from fastprompt import hf_attention
from fastprompt.prompts import packed


def encode_packed(
    model: Any, rows: Tensor, layout: packed.Layout, prompt: hf_attention.PromptKeys | None = None
) -> BaseModelOutput:
    """The encoder over rows [N, D], which attend to the prompt's keys too, and its output padded again: [B, L, D]."""
    encoder = packed.encoder_of(model)
    output = encoder(inputs_embeds=rows[:, None], attention_mask=layout.keys(model, prompt), return_dict=True)
    output.last_hidden_state = layout.padded(output.last_hidden_state)
    return output

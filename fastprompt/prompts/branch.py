# SPDX-License-Identifier: Apache-2.0
"""The cached prompt's own way through the encoder.

Its rows attend to its rows only, at positions 0 to P - 1, so nothing of it depends on the tokens: it runs once for all
examples, and what enters each encoder layer is what the tokens of every example attend to there. In training that is
once per step, so its dropout is drawn once per step too.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fastprompt._allowed import Allowed
from fastprompt.ops._indices import indices
from fastprompt.prompts.sites import serve


def run_branch(model: Any, prompts: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Run prompts [P_i, D] through the encoder, each by itself.

    The blocks are called here, as T5Stack and UMT5Stack do, because what transformers gives as output_hidden_states
    loses its gradient to checkpoints, and leaves hooks in the model.

    Returns:
        What enters each encoder layer, and the encoder's output: [R, P, D] each, P the longest. Rows beyond a prompt's
        own are filling. With gradient, if that is on.
    """
    serve(model)
    encoder = model.get_encoder()
    rows = pad_sequence(
        [prompt.to(encoder.embed_tokens.weight.dtype) for prompt in prompts], batch_first=True
    )
    lens = [len(prompt) for prompt in prompts]
    mask = None
    if min(lens) < max(lens):
        mask = torch.arange(rows.shape[1], device=rows.device) < indices(lens, rows.device)[:, None]
    hidden, entering = encoder.dropout(rows), []
    bias: tuple[Tensor, ...] = ()  # T5's first block makes it for the others; UMT5's have each their own
    for block in encoder.block:
        entering.append(hidden)
        output = block(hidden, Allowed(mask, 0, False), *bias)
        hidden, *others = output if isinstance(output, tuple) else (output,)
        bias = tuple(others[:1])
    return entering, encoder.dropout(encoder.final_layer_norm(hidden))

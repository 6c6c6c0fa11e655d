# SPDX-License-Identifier: Apache-2.0
"""The cached prompt's own way through the encoder.

Its rows attend to its rows only, at positions 0 to P - 1, so nothing of it depends on the tokens: it runs once for all
examples, and what enters each encoder layer is what the tokens of every example attend to there. In training that is
once per step, so its dropout is drawn once per step too.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def run_branch(model: Any, prompts: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Run prompts [P_i, D] through the encoder, each by itself.

    Returns:
        What enters each encoder layer, and the encoder's output: [R, P, D] each, P the longest. Rows beyond a prompt's
        own are filling. With gradient, if that is on.
    """
    encoder = model.get_encoder()
    table = encoder.get_input_embeddings().weight
    rows = pad_sequence([prompt.to(table.dtype) for prompt in prompts], batch_first=True)
    lens = [len(prompt) for prompt in prompts]
    mask = None
    if min(lens) < max(lens):
        index = torch.arange(rows.shape[1], device=rows.device)
        mask = (index < torch.tensor(lens, device=rows.device)[:, None]).long()
    with _kept_whole(encoder):
        output = encoder(
            inputs_embeds=rows,
            attention_mask=mask,
            output_hidden_states=True,
            output_attentions=False,
            return_dict=True,
        )
    return list(output.hidden_states[:-1]), output.last_hidden_state


@contextmanager
def _kept_whole(encoder: Any) -> Iterator[None]:
    """Without gradient checkpointing: the hidden states inside a checkpoint have no gradient, and they are few here."""
    checkpointed = [block for block in encoder.block if getattr(block, "gradient_checkpointing", False)]
    for block in checkpointed:
        block.gradient_checkpointing = False
    try:
        yield
    finally:
        for block in checkpointed:
            block.gradient_checkpointing = True


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """In eval mode: no dropout."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True

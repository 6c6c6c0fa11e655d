# SPDX-License-Identifier: Apache-2.0
"""Dropout of a T5: a rate of its own for each module, and the rates that reach fastprompt's kernels."""

from torch import nn
from transformers.models.t5.modeling_t5 import T5Attention

from fastprompt.dispatch import direct


def set_apart(model):
    for number, module in enumerate(model.modules(), 1):
        if isinstance(module, nn.Dropout):
            module.p = number / 512
        elif isinstance(module, T5Attention):
            module.dropout = number / 512
    return model


def kernels_rates(monkeypatch):
    """From now on, the rate of each call of a kernel that draws a mask: its last argument."""
    rates, kernels = [], dict(vars(direct))
    for name in ("dropout_add", "gated_act", "prompt_embed", "relu_dropout", "t5_attention"):

        def kernel(*args, run=kernels[name]):
            rates.extend(p for p in args[-1:] if p > 0.0)
            return run(*args)

        monkeypatch.setattr(direct, name, kernel)
    return rates

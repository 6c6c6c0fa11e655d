# SPDX-License-Identifier: Apache-2.0
"""The ops, one page each: formula, schema, reference, fake, autograd and backends."""

from fastprompt.ops._device_errors import raise_device_errors
from fastprompt.ops._t5_bias import t5_bias_table
from fastprompt.ops.dropout_add import dropout_add
from fastprompt.ops.frozen_linear import frozen_linear
from fastprompt.ops.gated_act import gated_act
from fastprompt.ops.linear_cross_entropy import linear_cross_entropy
from fastprompt.ops.prompt_embed import prompt_embed
from fastprompt.ops.relu_dropout import relu_dropout
from fastprompt.ops.rms_norm import rms_norm
from fastprompt.ops.t5_attention import t5_attention

__all__ = [
    "dropout_add",
    "frozen_linear",
    "gated_act",
    "linear_cross_entropy",
    "prompt_embed",
    "raise_device_errors",
    "relu_dropout",
    "rms_norm",
    "t5_attention",
    "t5_bias_table",
]

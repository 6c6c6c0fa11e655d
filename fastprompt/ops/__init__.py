# SPDX-License-Identifier: Apache-2.0
"""The ops, one page each: formula, schema, reference, fake, autograd and backends."""

from fastprompt.ops._device_errors import raise_device_errors
from fastprompt.ops._t5_bias import t5_bias_table
from fastprompt.ops.prompt_embed import prompt_embed
from fastprompt.ops.rms_norm import rms_norm
from fastprompt.ops.t5_attention import t5_attention

__all__ = ["prompt_embed", "raise_device_errors", "rms_norm", "t5_attention", "t5_bias_table"]

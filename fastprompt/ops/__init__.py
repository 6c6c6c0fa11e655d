# SPDX-License-Identifier: Apache-2.0
"""The ops, one page each: formula, schema, reference, fake, autograd and backends."""

from fastprompt.ops._device_errors import raise_device_errors
from fastprompt.ops.prompt_embed import prompt_embed
from fastprompt.ops.rms_norm import rms_norm

__all__ = ["prompt_embed", "raise_device_errors", "rms_norm"]

# SPDX-License-Identifier: Apache-2.0
"""The relative position bias of a transformers attention layer, as the table by distance that t5_attention reads."""

from typing import Any

from torch import Tensor, nn

from fastprompt._bias_by_distance import makes_t5s_bias
from fastprompt._hooks import is_hooked
from fastprompt._plain import PLAIN_TYPES
from fastprompt.ops import t5_bias_table
from fastprompt.ops._t5_bias import makes_table


def bias_table(attention: Any) -> Tensor:
    """fp32 [H, 2M + 1]: the bias by distance, constant beyond M on either side."""
    return t5_bias_table(
        attention.relative_attention_bias.weight,
        bidirectional=not attention.is_decoder,
        num_buckets=attention.relative_attention_num_buckets,
        max_distance=attention.relative_attention_max_distance,
    )


def has_bias_table(attention: Any) -> bool:
    """T5's formula gives no constant beyond max_distance, where that is too small for its buckets."""
    return makes_table(
        attention.relative_attention_num_buckets,
        attention.relative_attention_max_distance,
        bidirectional=not attention.is_decoder,
    )


def is_plain_bias(attention: Any) -> bool:
    """Is the bias its embedding's weight by T5's formula and no more, as with methods of its own, LoRA, quantised
    weights, a norm of the rows, or hooks?
    """
    embedding = attention._modules.get("relative_attention_bias")
    return (
        makes_t5s_bias(attention)
        and type(embedding) is nn.Embedding
        and type(embedding.weight) in PLAIN_TYPES
        and embedding.max_norm is None
        and not is_hooked(embedding)
    )

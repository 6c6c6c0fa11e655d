# SPDX-License-Identifier: Apache-2.0
"""The relative position bias of a transformers attention layer as the table by distance that t5_attention reads, and
what of such a layer that op does not cover.
"""

from typing import Any

from torch import Tensor, nn

from fastprompt._bias_by_distance import makes_t5s_bias
from fastprompt._hooks import is_hooked
from fastprompt._tensors import is_sharded
from fastprompt.dispatch.plain import PLAIN_TYPES
from fastprompt.modules._ready import is_evaluated
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


def bias_obstacle(attention: Any, inputs: tuple[Tensor, ...] | None = None) -> str | None:
    """Why no table says the bias of this layer, or of a stack whose first it is; None: one does.

    ``inputs``: of a call, whose weights may learn nothing; None: the question is of training.
    """
    if not makes_t5s_bias(attention):
        return "relative_attention_bias goes through a compute_bias of its own"
    embedding = attention._modules.get("relative_attention_bias")
    if not _is_plain(embedding):
        weight = getattr(embedding, "weight", None)
        sharded = weight is not None and is_sharded(weight)
        return "relative_attention_bias" + (".weight is sharded" if sharded else " is more than its weight")
    if embedding.weight.requires_grad and not is_evaluated(attention, inputs):
        return "relative_attention_bias.weight is trained"
    buckets, distance = attention.relative_attention_num_buckets, attention.relative_attention_max_distance
    # T5's formula gives no constant beyond max_distance, where that is too small for its buckets.
    if not makes_table(buckets, distance, bidirectional=not attention.is_decoder):
        return f"relative_attention_bias has {buckets} buckets, too many for the distance {distance}"
    return None


def _is_plain(embedding: Any) -> bool:
    """Is it its weight and no more? It is not with LoRA, quantised weights, a norm of the rows, or hooks."""
    return (
        type(embedding) is nn.Embedding
        and type(embedding.weight) in PLAIN_TYPES
        and embedding.max_norm is None
        and not is_hooked(embedding)
    )

# SPDX-License-Identifier: Apache-2.0
"""T5's relative position bias as what it is: one number per head and distance."""

from typing import Any

import torch
from torch import Tensor

from fastprompt.dispatch.plain import is_capturing, is_plain
from fastprompt.ops._checks import FLOATS, as_int, check_tensor, fail


def t5_bias_table(
    weight: Tensor, *, bidirectional: bool, num_buckets: int = 32, max_distance: int = 128
) -> Tensor:
    """The bias of every distance, for :func:`fastprompt.ops.t5_attention`.

    Buckets come from Hugging Face's own function on the weight's device, so that they are the model's bit for bit.
    From ``max_distance`` on the bias is constant on either side, and the table ends.

    Args:
        weight: [num_buckets, H] float32, bfloat16, float16 or float64, that of a T5Attention's
            ``relative_attention_bias``.
        bidirectional: True in an encoder, False in a decoder.
        num_buckets: ``config.relative_attention_num_buckets``.
        max_distance: ``config.relative_attention_max_distance``.

    Returns:
        fp32 [H, 2M + 1] with M = max_distance: entry M + d is for a key d positions after the query. Without gradient.

    Raises:
        TypeError, ValueError: the weight has another dtype or shape, or a number is none or too small for the formula.
    """
    num_buckets = as_int("t5_bias_table", "num_buckets", num_buckets)
    max_distance = as_int("t5_bias_table", "max_distance", max_distance)
    check_tensor("t5_bias_table", "weight", weight, FLOATS)
    if weight.dim() != 2 or weight.shape[0] != num_buckets:
        fail(
            "t5_bias_table",
            f"weight must have shape [num_buckets, H]=[{num_buckets}, H], got {list(weight.shape)}",
        )
    if not makes_table(num_buckets, max_distance, bidirectional):
        exact = _exact_buckets(num_buckets, bidirectional)
        if exact < 1:
            fail(
                "t5_bias_table", f"num_buckets must be {4 if bidirectional else 2} or more, got {num_buckets}"
            )
        fail(
            "t5_bias_table",
            f"max_distance must exceed the {exact} exact buckets of num_buckets={num_buckets}, got {max_distance}",
        )
    buckets = _buckets_of(weight, bidirectional, num_buckets, max_distance)
    return weight.detach().T.float().index_select(1, buckets)


# Buckets [2M + 1] by device and settings: to make them takes a dozen small operations, for each stack of each call.
_known: dict[tuple[Any, ...], Tensor] = {}


def _buckets_of(weight: Tensor, *settings: Any) -> Tensor:
    key, plain, captured = (weight.device, *settings), is_plain(weight), is_capturing(weight.device)
    if (plain or captured) and key in _known:
        return _known[key]
    if captured or not plain:
        return _buckets(weight.device, *settings)
    with torch.inference_mode(False):  # calls outside of it will read them
        found = _buckets(weight.device, *settings)
    if weight.is_cuda:
        torch.cuda.current_stream(weight.device).synchronize()  # as will other streams
    _known[key] = found
    return found


def _buckets(device: torch.device, bidirectional: bool, num_buckets: int, max_distance: int) -> Tensor:
    from transformers.models.t5.modeling_t5 import T5Attention

    distance = torch.arange(-max_distance, max_distance + 1, device=device)
    return T5Attention._relative_position_bucket(
        distance, bidirectional=bidirectional, num_buckets=num_buckets, max_distance=max_distance
    )


def makes_table(num_buckets: int, max_distance: int, bidirectional: bool) -> bool:
    """Is there a distance from which on the bias is constant?"""
    return 0 < _exact_buckets(num_buckets, bidirectional) < max_distance


def _exact_buckets(num_buckets: int, bidirectional: bool) -> int:
    """So many distances on a side have a bucket each; beyond, buckets are logarithmic up to the max_distance."""
    return num_buckets // (4 if bidirectional else 2)

# SPDX-License-Identifier: Apache-2.0
"""Keys and values of a decoder's layers that stay where they are, as caches of transformers' see them."""

from typing import Any

from torch import Tensor
from transformers.cache_utils import StaticLayer


class OwnKeys(StaticLayer):
    """A layer's keys and values [B, H, room, K] of the tokens, of which all layers count the same."""

    keys: Tensor
    values: Tensor
    at: Tensor  # int64 [T], where those of the tokens now computed go

    def __init__(self, keys: Tensor, values: Tensor, count: Tensor) -> None:
        super().__init__(max_cache_len=keys.shape[2])
        self.keys, self.values, self.cumulative_length = keys, values, count
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(2, self.at, key_states)
        self.values.index_copy_(2, self.at, value_states)
        return self.keys, self.values


class CrossKeys(StaticLayer):
    """Those [B, H, S, K] of the encoder's rows, which come at once."""

    keys: Tensor
    values: Tensor

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__(max_cache_len=keys.shape[2])
        self.keys, self.values = keys, values
        self.is_initialized, self.is_filled = True, False

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.keys.copy_(key_states)
        self.values.copy_(value_states)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.max_cache_len if self.is_filled else 0

# SPDX-License-Identifier: Apache-2.0
"""What attention layers are told in place of a dense mask: which keys a query may attend to, and prompts' keys."""

from typing import Any, NamedTuple, Self

from torch import Tensor

from fastprompt._note import KEPT, leave_note, note_on


def mark_kept(keys: tuple[Tensor, ...]) -> None:
    """These keys of prompts, one per layer, stay where they are from call to call."""
    leave_note(keys[0], KEPT, True)


def is_kept(keys: tuple[Tensor, ...]) -> bool:
    return note_on(keys[0], KEPT) is not None


def _of_layer(bias: Tensor | tuple[Tensor, ...] | None, layer: int) -> Tensor | None:
    return bias[layer] if isinstance(bias, tuple) else bias


class PromptKeys(NamedTuple):
    """Keys and values of prompts, in front of an example's own, for every layer of a stack.

    t5_attention reads them in place, for each example those of its prompt; nothing is copied per example.
    """

    keys: tuple[Tensor, ...]  # per layer [R, P, H, K]
    values: tuple[Tensor, ...]  # per layer [R, P, H, K]
    ids: Tensor | None = None  # int64 [B], the prompt of each example; None: all take the only one
    lens: Tensor | None = None  # int64 [R], how many of the P keys each prompt has; None: all
    # fp32 [H, 2M + 1] of t5_bias_table, or one per layer as in UMT5; None in cross-attention, which has none
    bias: Tensor | tuple[Tensor, ...] | None = None

    def bias_of(self, layer: int) -> Tensor | None:
        return _of_layer(self.bias, layer)

    def for_batch(self, B: int) -> Self:
        """With ids of B rows: generate repeats each example for its beams and returned sequences."""
        if self.ids is None or len(self.ids) == B:
            return self
        return self._replace(ids=self.ids.repeat_interleave(B // len(self.ids)))


class Allowed(NamedTuple):
    """Which keys a query may attend to."""

    mask: Tensor | None  # bool [B, S]: the key is no padding; None: none is
    offset: int | Tensor  # the position of query 0 among the keys; a tensor with a static cache
    causal: bool
    prompt: PromptKeys | None = None
    # int64 [B + 1]: the rows are packed, [N, 1, D], and example b begins at row cu[b]
    cu: Tensor | None = None
    # As PromptKeys.bias, which comes first: what packed rows without a prompt need in place of the stack's own, whose
    # distances they do not have
    bias: Tensor | tuple[Tensor, ...] | None = None
    keys: int | None = None  # so many the stack counts, where the mask is causal; None: it does not say

    def of_layer(self, T: int, S: int) -> Self:
        """For T queries of a layer with S keys.

        The stack counts those of its first layer's cache, which a block that was taken out leaves empty. transformers
        makes no mask for a single query, which sees all keys, and can add none of another width to more.
        """
        if self.keys is None or self.keys == S or isinstance(self.offset, Tensor):
            return self
        if T != 1:
            raise ValueError(
                f"fastprompt: the decoder's cache holds {S - T} keys for this layer and {self.keys - T} for the first,"
                f" as where a block was taken out: a call can then have one token, got {T}. Use use_cache=False"
            )
        return self._replace(offset=S - 1, keys=S)

    def fits(self, S: int) -> bool:
        """Has the mask a column per key? generate's chunked prefill leaves cross-attention fewer."""
        return self.mask is None or self.mask.shape[1] == S

    def brings_bias(self) -> bool:
        return self.prompt is not None or self.bias is not None

    def bias_of(self, layer: int) -> Tensor | None:
        if self.prompt is not None:
            return self.prompt.bias_of(layer)
        return _of_layer(self.bias, layer)

    def prompt_of(self, layer: Any) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """What t5_attention is told of the prompts of one layer: keys, values, ids and lens."""
        prompt = self.prompt
        if prompt is None:
            return None, None, None, None
        return prompt.keys[layer], prompt.values[layer], prompt.ids, prompt.lens

    def contiguous(self) -> Self:
        """generate asks a static cache's mask for it in transformers 5.18 to 5.23."""
        return self

    @property
    def ndim(self) -> int:
        """generate makes a static cache's mask itself; T5 asks whether it is one [B, S], then for its mask."""
        return 0

    @property
    def shape(self) -> tuple[int, ...]:
        """transformers takes a number of keys from the last entry for :func:`allowed_keys`, which has its own."""
        return (0,)

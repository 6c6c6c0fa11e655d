# SPDX-License-Identifier: Apache-2.0
"""PromptBank: the named fp32 master prompts, and the choice among them for a batch."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from fastprompt.prompts.prefix import PrefixPrompt

Names = str | Sequence[str] | None

_TAKEN = frozenset(dir(nn.ParameterDict()))  # names a parameter of a ParameterDict cannot have


class Choice(NamedTuple):
    """The prompts of one batch.

    names: the distinct prompts in use.
    prompts: them: [P_i, D], or a PrefixPrompt.
    ids: which of them each of the B rows takes; None if there is only one.
    lengths: P_b of each row.
    """

    names: list[str]
    prompts: list[Any]
    ids: list[int] | None
    lengths: list[int]


class PromptBank(nn.ParameterDict):
    """Trainable prompts by name, each an fp32 Parameter [P, D], or a PrefixPrompt of fp32 Parameters.

    They stay fp32 when the module around them is cast: the rows of trained T5 prompts have norms from 200 to
    2000, where a learning step is often less than bf16 can add.
    """

    def __setitem__(self, name: str, rows: Any) -> None:
        if not isinstance(name, str) or not name or "." in name or name in _TAKEN:
            raise ValueError(
                "PromptModel: a prompt's name must be a str that is not empty, has no '.' and is no attribute "
                f"of ParameterDict (such as 'train' or 'keys'), got {name!r}"
            )
        if isinstance(rows, PrefixPrompt):
            super().__setitem__(name, rows)
            return
        if not isinstance(rows, Tensor) or rows.dtype != torch.float32 or rows.ndim != 2:
            got = f"{rows.dtype} {list(rows.shape)}" if isinstance(rows, Tensor) else type(rows).__name__
            raise ValueError(f"PromptModel: prompt {name!r} must be a float32 tensor [P, D], got {got}")
        super().__setitem__(name, nn.Parameter(rows))

    def choose(self, names: Names, batch: int) -> Choice:
        """The prompts for ``batch`` rows.

        Args:
            names: one name for all rows, one name per row, or None for the bank's first prompt.
            batch: B, at least 1.

        Raises:
            TypeError: ``names`` is neither a str nor a sequence.
            ValueError: an unknown name, another number of names than rows, or no prompt at all.
        """
        if not self:
            raise ValueError("PromptModel: there is no prompt. Add one with add_prompt or load_prompt")
        if names is None:
            names = next(iter(self.keys()))
        if not isinstance(names, Sequence):
            raise TypeError(
                f"PromptModel: prompts must be a name or a list of names, got {type(names).__name__}"
            )
        per_row = [names] * batch if isinstance(names, str) else list(names)
        if len(per_row) != batch:
            raise ValueError(
                "PromptModel: prompts must be one name or one name per row, "
                f"got {len(per_row)} names for {batch} rows"
            )
        for name in per_row:
            if not isinstance(name, str) or name not in self:
                raise ValueError(f"PromptModel: there is no prompt {name!r}; there are {list(self.keys())}")
        used = list(dict.fromkeys(per_row))
        prompts = [self[name] for name in used]
        ids = [used.index(name) for name in per_row]
        return Choice(used, prompts, ids if len(used) > 1 else None, [len(prompts[i]) for i in ids])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def keep_fp32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == torch.float32 else tensor.to(moved.device)

        return super()._apply(keep_fp32, recurse)

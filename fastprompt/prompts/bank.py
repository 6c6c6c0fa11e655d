# SPDX-License-Identifier: Apache-2.0
"""PromptBank: the named fp32 master prompts, and those selected for a batch."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from fastprompt._tensors import parts_of
from fastprompt.prompts.cache import PromptCaches
from fastprompt.prompts.prefix import PrefixPrompt
from fastprompt.prompts.stored import StoredPrompts

Names = str | Sequence[str] | None


class Selection(NamedTuple):
    """The prompts of one batch.

    names: the distinct prompts in use.
    prompts: them: [P_i, D], or a PrefixPrompt.
    ids: which of them each of the B rows takes; None if there is only one.
    lengths: P_b of each row; the one of all rows where there is only one prompt.
    """

    names: list[str]
    prompts: list[Any]
    ids: list[int] | None
    lengths: list[int]


class PromptBank(nn.ParameterDict):
    """Trainable prompts by name, each an fp32 Parameter [P, D], or a PrefixPrompt of fp32 Parameters.

    They stay fp32 when the module around them is cast: the rows of trained T5 prompts have norms from 200 to
    2000, where a learning step is often less than bf16 can add.

    Batches may also name the prompts of a store that is attached; those are no Parameters, and the bank's own hide
    any of the same name.
    """

    _stored: StoredPrompts | None = None

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and super().__contains__(name)  # a list is no key to look for

    def attach(self, stored: StoredPrompts | None) -> None:
        """Let batches name these prompts too; None: no more."""
        self._stored = stored

    def rename(self, old: str, new: str) -> None:
        """Give a prompt another name, in its place among the others. Its Parameters stay the same objects.

        Other threads find all others meanwhile: each dictionary is replaced as a whole.
        """
        self.check_name(new)
        for group in ("_parameters", "_modules", "_keys"):
            entries = self.__dict__[group].items()
            self.__dict__[group] = {new if name == old else name: value for name, value in entries}

    def __setitem__(self, name: str, rows: Any) -> None:
        self.check_name(name)
        if isinstance(rows, PrefixPrompt):
            super().__setitem__(name, rows)
            return
        plain = isinstance(rows, Tensor) and not parts_of(rows)
        if not plain or rows.dtype != torch.float32 or rows.ndim != 2:
            got = f"{rows.dtype} {list(rows.shape)}" if plain else type(rows).__name__
            raise ValueError(f"PromptModel: prompt {name!r} must be a float32 tensor [P, D], got {got}")
        super().__setitem__(name, nn.Parameter(rows))

    def select(self, names: Names, batch: int) -> Selection:
        """The prompts for ``batch`` rows.

        Args:
            names: one name for all rows, one name per row, or None for the bank's first prompt.
            batch: B, at least 1.

        Raises:
            TypeError: ``names`` is neither a str nor a sequence.
            ValueError: an unknown name, another number of names than rows, or no prompt at all.
        """
        if not self and self._stored is None:
            raise ValueError("PromptModel: there is no prompt. Add one with add_prompt or load_prompt")
        if names is None:
            names = self._first()
        if not isinstance(names, Sequence):
            raise TypeError(
                f"PromptModel: prompts must be a name or a list of names, got {type(names).__name__}"
            )
        if isinstance(names, str):  # whatever the batch: torch.compile may know its size by a symbol
            prompt = self.find(names)
            return Selection([names], [prompt], None, [len(prompt)])
        if len(names) != batch:
            raise ValueError(
                "PromptModel: prompts must be one name or one name per row, "
                f"got {len(names)} names for {batch} rows"
            )
        for name in names:
            if not isinstance(name, str):
                raise ValueError(f"PromptModel: there is no prompt {name!r}: names are str")
        used = list(dict.fromkeys(names))
        prompts = [self.find(name) for name in used]
        if len(used) == 1:
            return Selection(used, prompts, None, [len(prompts[0])])
        number = {name: i for i, name in enumerate(used)}
        ids = [number[name] for name in names]
        return Selection(used, prompts, ids, [len(prompts[i]) for i in ids])

    def kind_of_stored(self, name: str) -> str | None:
        """The kind of an attached store's prompt; None if ``name`` is the bank's own or unknown."""
        stored = self._stored
        return stored.kind(name) if stored is not None and name not in self and name in stored else None

    def trim(self, caches: PromptCaches, used: Iterable[str] = ()) -> None:
        """Let an attached store's prompts go that are over its ``keep_bytes``, but for those in use or kept."""
        if self._stored is not None:
            self._stored.trim({*used, *caches.names})

    def holds(self, name: str) -> bool:
        """Is there a prompt of that name, in the bank or in the store?"""
        return name in self or (self._stored is not None and name in self._stored)

    def find(self, name: str) -> Any:
        """The prompt, of the bank or of the store. ValueError: there is none of that name."""
        if name in self:
            return self[name]
        if self._stored is not None and name in self._stored:
            return self._stored.prompt(name)
        also = "" if self._stored is None else f" and {len(self._stored)} in {self._stored.store.path!s}"
        raise ValueError(f"PromptModel: there is no prompt {name!r}; there are {list(self.keys())}{also}")

    def _first(self) -> str:
        if not self:
            raise ValueError(
                "PromptModel: prompts= must name prompts of the store: the bank has none of its own"
            )
        return next(iter(self.keys()))

    def check_name(self, name: object) -> None:
        """Raise ValueError unless a prompt may have this name."""
        if not isinstance(name, str) or not name or "." in name or name in _TAKEN:
            raise ValueError(
                "PromptModel: a prompt's name must be a str that is not empty, has no '.' and is no attribute "
                f"of the bank (such as 'train' or 'keys'), got {name!r}"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def keep_fp32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == torch.float32 else tensor.to(moved.device)

        if self._stored is not None:
            self._stored.apply(fn)
        return super()._apply(keep_fp32, recurse)


_TAKEN = frozenset(dir(PromptBank()))  # names a parameter of the bank cannot have

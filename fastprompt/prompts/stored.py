# SPDX-License-Identifier: Apache-2.0
"""StoredPrompts: a store's prompts as a PromptModel's batches use them, frozen; the last ones used stay in memory."""

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from fastprompt.prompts.identity import ModelIdentity
from fastprompt.prompts.layout import ModelShape
from fastprompt.prompts.loading import Prompt, check_fits, prompt_of
from fastprompt.prompts.store import PromptStore


class StoredPrompts:
    """The prompts of ``store``, each read when it is first used.

    Args:
        store: where they are.
        shape: the model's sizes, which each must have.
        identity: the model's, which each must belong to if it says to which it does; None: any.
        device: where they are used.
        keep_bytes: of fp32 prompts that may stay in memory, beside those of the batch at hand.
    """

    def __init__(
        self,
        store: PromptStore,
        shape: ModelShape,
        identity: ModelIdentity | None,
        device: torch.device,
        keep_bytes: int,
    ) -> None:
        self.store, self.shape, self.identity, self.device = store, shape, identity, device
        self.keep_bytes = keep_bytes
        # name: kind and prompt, the last used last. Threads share it: what one saw there, another may have dropped.
        self._kept: dict[str, tuple[str, Prompt]] = {}

    def __contains__(self, name: object) -> bool:
        return name in self.store

    def __len__(self) -> int:
        return len(self.store)

    def prompt(self, name: str) -> Prompt:
        """The prompt, frozen. Raises as :meth:`PromptStore.__getitem__`; ValueError: it does not fit the model."""
        return self._entry(name)[1]

    def kind(self, name: str) -> str:
        """The prompt's kind."""
        return self._entry(name)[0]

    def trim(self, used: Collection[str]) -> None:
        """Forget what was not used for longest, until ``keep_bytes`` hold the rest; never what is in ``used``."""
        others = {name: _bytes(prompt) for name, (_, prompt) in list(self._kept.items()) if name not in used}
        total = sum(others.values())
        for name, size in others.items():
            if total <= self.keep_bytes:
                return
            self._kept.pop(name, None)
            total -= size

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Follow a module that is moved; what is kept is read again there."""
        device = fn(torch.empty(0, device=self.device)).device
        if device != self.device:
            self.device = device
            self._kept.clear()

    def _entry(self, name: str) -> tuple[str, Prompt]:
        entry = self._kept.pop(name, None)
        if entry is None:
            file = self.store[name]
            check_fits(f"PromptModel: {name!r} of {self.store.path!s}", file, self.shape, self.identity)
            with torch.inference_mode(False):  # whose tensors tell nobody when they are written to
                prompt = prompt_of(file, self.device)
            entry = file.kind, prompt.requires_grad_(False)
        self._kept[name] = entry
        return entry


def _bytes(prompt: Prompt) -> int:
    tensors = [prompt] if isinstance(prompt, Tensor) else list(prompt.parameters())
    return sum(tensor.nbytes for tensor in tensors)

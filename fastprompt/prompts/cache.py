# SPDX-License-Identifier: Apache-2.0
"""Keys and values of prompts, computed once and kept for serving, and the memory of what they were computed from.

A pool holds the prompts of one ``cache_prompts`` call side by side, so that a batch that names any of them reads them
where they lie. It is stale once a tensor of a prompt or of the model was written to, replaced, cast or moved, and once
autocast is switched; then it is computed again. A step of an optimiser that holds the tensor counts as writing to it,
for fused ones leave its version as it was. Other writing through ``tensor.data`` leaves no trace: drop caches after it.
"""

import weakref
from collections.abc import Container, Iterable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

from fastprompt.prompts.config import SITES
from fastprompt.prompts.keyed import Keyed, Part


class Trace(NamedTuple):
    """What a tensor was. The weak references keep addresses from being given to others."""

    tensor: Any
    storage: Any
    version: int
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> "Trace":
        return cls(
            weakref.ref(tensor), StorageWeakRef(tensor.untyped_storage()), tensor._version, tensor.dtype
        )

    def fits(self, tensor: Tensor) -> bool:
        return (
            self.tensor() is tensor
            and self.version == tensor._version
            and self.dtype == tensor.dtype
            and self.storage.cdata == tensor.untyped_storage()._cdata
        )


class Stamp:
    """The state of some tensors and of autocast at one moment."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.traces = [Trace.of(tensor) for tensor in tensors]
        self.autocast = _autocast()
        self.stepped = False

    def note_step(self, parameters: Container[int]) -> None:
        """An optimiser wrote to the tensors with these ids."""
        self.stepped = self.stepped or any(id(trace.tensor()) in parameters for trace in self.traces)

    def fits(self, tensors: Sequence[Tensor]) -> bool:
        return (
            not self.stepped
            and len(tensors) == len(self.traces)
            and all(trace.fits(tensor) for trace, tensor in zip(self.traces, tensors, strict=True))
            and self.autocast == _autocast()
        )


class Pool(NamedTuple):
    names: tuple[str, ...]
    stamps: tuple[Stamp, ...]  # of each prompt
    model: Stamp
    keyed: Keyed


class PromptCaches:
    """The pools of a PromptModel. Copies and pickles of it are empty: they are made again where they are used."""

    def __init__(self) -> None:
        self._pools: list[Pool] = []

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return PromptCaches, ()

    @property
    def names(self) -> set[str]:
        return {name for pool in self._pools for name in pool.names}

    def keep(self, names: Sequence[str], prompts: Sequence[Any], model: nn.Module, keyed: Keyed) -> None:
        """Keep what was computed of these prompts, in place of what was kept of them before."""
        self.drop(names)
        _KEEPING.add(self)
        _watch_optimizers()
        stamps = tuple(Stamp(tensors_of(prompt)) for prompt in prompts)
        self._pools.append(Pool(tuple(names), stamps, Stamp(tensors_of(model)), keyed))

    def drop(self, names: Iterable[str]) -> None:
        """Forget what is kept of these prompts; a pool goes once none of its prompts is wanted."""
        gone = set(names)
        kept = [
            pool._replace(names=tuple("" if name in gone else name for name in pool.names))
            for pool in self._pools
        ]
        self._pools = [pool for pool in kept if any(pool.names)]

    def note_step(self, parameters: Container[int]) -> None:
        """An optimiser wrote to the tensors with these ids."""
        for pool in self._pools:
            for stamp in (*pool.stamps, pool.model):
                stamp.note_step(parameters)

    def pool_of(self, name: str) -> Pool | None:
        return next((pool for pool in self._pools if name in pool.names), None)

    def stale(self, prompts: Mapping[str, Any], model: nn.Module) -> set[str]:
        """The prompts of all pools that have one of ``prompts`` whose kept keys are not its keys any more."""
        found: set[str] = set()
        state = tensors_of(model) if self._pools else []
        for pool in self._pools:
            here = [name for name in pool.names if name in prompts]
            if here and not (
                pool.model.fits(state)
                and all(pool.stamps[pool.names.index(name)].fits(tensors_of(prompts[name])) for name in here)
            ):
                found |= set(pool.names) - {""}
        return found

    def parts(self, names: Sequence[str]) -> tuple[dict[str, list[Part]], list[int]]:
        """By site, the keys kept of these prompts; and the numbers of the prompts of which none are kept."""
        parts: dict[str, list[Part]] = {site: [] for site in SITES}
        for pool in self._pools:
            wanted = {i: pool.names.index(name) for i, name in enumerate(names) if name in pool.names}
            for site, (keys, rows) in pool.keyed.items():
                if wanted:
                    parts[site].append((keys, {i: rows[number] for i, number in wanted.items()}))
        return parts, [i for i, name in enumerate(names) if self.pool_of(name) is None]


_KEEPING: weakref.WeakSet[PromptCaches] = weakref.WeakSet()


@cache
def _watch_optimizers() -> None:
    register_optimizer_step_post_hook(_note_step)


def _note_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    if _KEEPING:
        parameters = {id(each) for group in optimizer.param_groups for each in group["params"]}
        for caches in list(_KEEPING):
            caches.note_step(parameters)


def tensors_of(owner: Tensor | nn.Module) -> list[Tensor]:
    """The tensor, or all parameters and buffers."""
    if isinstance(owner, Tensor):
        return [owner]
    return [
        tensor
        for module in owner.modules()
        for group in (module._parameters, module._buffers)
        for tensor in group.values()
        if tensor is not None
    ]


def _autocast() -> tuple[torch.dtype | None, ...]:
    return tuple(
        torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        for device in ("cpu", "cuda")
    )

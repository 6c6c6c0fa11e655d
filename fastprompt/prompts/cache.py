# SPDX-License-Identifier: Apache-2.0
"""Keys and values of prompts, computed once and kept for serving, and the memory of what they were computed from.

A pool holds the prompts of one ``cache_prompts`` call side by side, so that a batch that names any of them reads them
where they lie. A prompt in it is stale once its stamp (fastprompt._stamp) does not fit any more, all of them
once the model's does not, and once an optimiser that holds one of their tensors has made a step, for fused ones leave
no other trace; then they are computed again, in a pool of their own.
"""

import weakref
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from fastprompt._allowed import mark_kept
from fastprompt._stamp import Stamp, State
from fastprompt.prompts.config import SITES
from fastprompt.prompts.keyed import Keyed, Part, SiteKeys
from fastprompt.prompts.sites import Keys


class KeptPool(NamedTuple):
    names: tuple[str, ...]  # "" where a prompt is not wanted any more
    stamps: tuple[Stamp, ...]  # of each prompt
    model: Stamp
    keyed: Keyed


class PromptCaches:
    """The pools of a PromptModel. Copies and pickles of it are empty: they are made again where they are used."""

    def __init__(self) -> None:
        self._pools: list[KeptPool] = []
        self._making: list[Stamp] = []  # of what is computed now

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return PromptCaches, ()

    @property
    def names(self) -> set[str]:
        return {name for pool in self._pools for name in pool.names if name}

    def keep(
        self, names: Sequence[str], prompts: Sequence[Any], model: nn.Module, make: Callable[[], Keyed]
    ) -> None:
        """Keep what ``make`` computes of these prompts, in place of what was kept of them before.

        Stamps come first: what another thread writes meanwhile makes the result stale.
        """
        _KEEPING.add(self)
        _watch_optimizers()
        stamps = tuple(Stamp(State.of(owner)) for owner in (*prompts, model))
        self._making = [*self._making, *stamps]
        try:
            pool = KeptPool(tuple(names), stamps[:-1], stamps[-1], _heads_first(make()))
        finally:
            self._making = [stamp for stamp in self._making if stamp not in stamps]
        for site in pool.keyed.values():
            mark_kept(site.keys.keys)
        self.drop(names)
        self._pools = [*self._pools, pool]

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
        kept = [stamp for pool in self._pools for stamp in (*pool.stamps, pool.model)]
        for stamp in (*kept, *self._making):
            stamp.note_step(parameters)

    def stale(self, prompts: Mapping[str, Any], model: nn.Module) -> list[str]:
        """Those of ``prompts`` whose kept keys are not their keys any more; where that is because the model changed,
        with all others of their pools.

        A prompt that changed is computed again by itself: a server that exchanges one of hundreds does not wait for
        the others.
        """
        if not self._pools:
            return []
        state, found = State.of(model), []
        for pool in self._pools:
            here = {name: i for i, name in enumerate(pool.names) if name in prompts}
            if here and not pool.model.fits(state):
                found += [name for name in pool.names if name]
            else:
                found += [n for n, i in here.items() if not pool.stamps[i].fits(State.of(prompts[n]))]
        return found

    def parts(self, names: Sequence[str]) -> tuple[dict[str, list[Part]], list[int]]:
        """By site, the keys kept of these prompts; and the numbers of the prompts of which none are kept."""
        parts: dict[str, list[Part]] = {site: [] for site in SITES}
        pools = self._pools  # others may put a list in its place meanwhile
        for pool in pools:
            wanted = {i: pool.names.index(name) for i, name in enumerate(names) if name in pool.names}
            for site, (keys, rows) in pool.keyed.items():
                if any(keys.lens[rows[number]] for number in wanted.values()):
                    parts[site].append((keys, {i: rows[number] for i, number in wanted.items()}))
        kept = {name for pool in pools for name in pool.names}
        return parts, [i for i, name in enumerate(names) if name not in kept]


def _heads_first(keyed: Keyed) -> Keyed:
    """The same keys and values [R, P, H, K], stored as [R, H, P, K].

    Each step of decoding reads them once, a head at a time, from memory and not from the caches where a batch has many
    prompts.
    """

    def stored(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(each.transpose(1, 2).contiguous().transpose(1, 2) for each in tensors)

    return {
        site: SiteKeys(Keys(stored(keys.keys), stored(keys.values), keys.lens), rows)
        for site, (keys, rows) in keyed.items()
    }


_KEEPING: weakref.WeakSet[PromptCaches] = weakref.WeakSet()


@cache
def _watch_optimizers() -> None:
    register_optimizer_step_post_hook(_note_step)


def _note_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    if _KEEPING:
        parameters = {id(each) for group in optimizer.param_groups for each in group["params"]}
        for caches in list(_KEEPING):
            caches.note_step(parameters)

# SPDX-License-Identifier: Apache-2.0
"""Keys and values of prompts, computed once and kept for serving, and the memory of what they were computed from.

A pool holds the prompts of one ``cache_prompts`` call side by side, so that a batch that names any of them reads them
where they lie. A prompt in it is stale once its stamp (fastprompt._stamp) does not fit any more, all of them
once the model's does not, and once an optimiser that holds one of their tensors has made a step, for fused ones leave
no other trace; then they are computed again, in a pool of their own. A pool is cut once half of it is not wanted.
"""

import weakref
from collections.abc import Callable, Container, Iterable, Mapping, Sequence, Set
from functools import cache
from threading import Lock
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
    stamps: tuple[Stamp, ...]  # of each prompt
    model: Stamp
    keyed: Keyed


class Kept(NamedTuple):
    """Where a prompt's keys are."""

    pool: KeptPool
    number: int  # of the prompt among the pool's


class PromptCaches:
    """What a PromptModel keeps. Copies and pickles of it are empty: keys are made again where they are used."""

    def __init__(self) -> None:
        # By name. Another dictionary takes its place, so that who reads this one needs no lock.
        self._kept: dict[str, Kept] = {}
        self._making: list[Stamp] = []  # of what is computed now
        self._lock = Lock()  # of what puts others in their places

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return PromptCaches, ()

    @property
    def names(self) -> Set[str]:
        return self._kept.keys()

    @property
    def pools(self) -> list[KeptPool]:
        return list({id(pool): pool for pool, _ in self._kept.values()}.values())

    def keep(
        self, names: Sequence[str], prompts: Sequence[Any], model: nn.Module, make: Callable[[], Keyed]
    ) -> None:
        """Keep what ``make`` computes of these prompts, in place of what was kept of them before.

        Stamps come first: what another thread writes meanwhile makes the result stale.
        """
        with _KEEPING_LOCK:
            _KEEPING.add(self)
        _watch_optimizers()
        stamps = tuple(Stamp(State.of(prompt)) for prompt in prompts)
        making = [*stamps, self._stamp_of(State.of(model))]
        with self._lock:
            self._making = [*self._making, *making]
        try:
            pool = KeptPool(stamps, making[-1], _heads_first(make()))
        finally:
            with self._lock:
                for stamp in making:
                    self._making.remove(stamp)
        self._put(set(names), {name: Kept(pool, number) for number, name in enumerate(names)})

    def drop(self, names: Iterable[str]) -> None:
        """Forget what is kept of these prompts."""
        self._put(set(names), {})

    def rename(self, name: str, new_name: str) -> None:
        """What is kept of ``name`` is from then on ``new_name``'s, of which nothing else is kept."""
        kept = self._kept.get(name)
        self._put({name, new_name}, {} if kept is None else {new_name: kept})

    def _put(self, gone: set[str], more: dict[str, Kept]) -> None:
        """``more`` in place of what is kept under the names ``gone``. A pool of which half is left is cut to that."""
        with self._lock:
            touched = {id(self._kept[name].pool) for name in gone if name in self._kept}
            if not (touched or more):
                return
            kept = {name: each for name, each in self._kept.items() if name not in gone} | more
            left: dict[int, list[str]] = {}
            for name, (pool, _) in kept.items():
                if id(pool) in touched:
                    left.setdefault(id(pool), []).append(name)
            for names in left.values():
                pool = kept[names[0]].pool
                if 2 * len(names) <= len(pool.stamps):
                    smaller = _cut(pool, [kept[name].number for name in names])
                    kept |= {name: Kept(smaller, number) for number, name in enumerate(names)}
            self._kept = kept

    def _stamp_of(self, model: State) -> Stamp:
        """The last one, if it is of this state: hundreds of pools share it, and a call compares it once."""
        last = next(reversed(self._kept.values()), None)
        return last.pool.model if last is not None and last.pool.model.fits(model) else Stamp(model)

    def note_step(self, parameters: Container[int]) -> None:
        """An optimiser wrote to the tensors with these ids."""
        kept = [stamp for pool in self.pools for stamp in (*pool.stamps, pool.model)]
        for stamp in (*kept, *self._making):
            stamp.note_step(parameters)

    def stale(self, prompts: Mapping[str, Any], model: nn.Module) -> list[str]:
        """Those of ``prompts`` whose kept keys are not their keys any more; where that is because the model changed,
        with all others of their pools.

        A prompt that changed is computed again by itself: a server that exchanges one of hundreds does not wait for
        the others.
        """
        kept = self._kept
        here = {name: kept[name] for name in prompts if name in kept}
        if not here:
            return []
        state = State.of(model)
        stamps = {id(pool.model): pool.model for pool, _ in here.values()}
        fits = {key: stamp.fits(state) for key, stamp in stamps.items()}
        old = {id(pool) for pool, _ in here.values() if not fits[id(pool.model)]}
        found = [name for name, (pool, _) in kept.items() if id(pool) in old] if old else []
        return found + [
            name
            for name, (pool, number) in here.items()
            if id(pool) not in old and not pool.stamps[number].fits(State.of(prompts[name]))
        ]

    def parts(self, names: Sequence[str]) -> tuple[dict[str, list[Part]], list[int]]:
        """By site, the keys kept of these prompts; and the numbers of the prompts of which none are kept."""
        parts: dict[str, list[Part]] = {site: [] for site in SITES}
        kept, missing = self._kept, []
        wanted: dict[int, dict[int, Kept]] = {}  # by pool
        for i, name in enumerate(names):
            if name in kept:
                wanted.setdefault(id(kept[name].pool), {})[i] = kept[name]
            else:
                missing.append(i)
        for some in wanted.values():
            pool = next(iter(some.values())).pool
            for site, (keys, rows) in pool.keyed.items():
                if any(keys.lens[rows[number]] for _, number in some.values()):
                    parts[site].append((keys, {i: rows[number] for i, (_, number) in some.items()}))
        return parts, missing


def _cut(pool: KeptPool, numbers: Sequence[int]) -> KeptPool:
    """The prompts with these numbers alone, in memory of their own."""
    keyed: Keyed = {}
    for site, (keys, rows) in pool.keyed.items():
        taken = [rows[number] for number in numbers]
        lens = tuple(keys.lens[row] for row in taken)
        if any(lens):
            some, values = (tuple(x[taken, : max(lens)] for x in each) for each in (keys.keys, keys.values))
            keyed[site] = SiteKeys(Keys(some, values, lens), tuple(range(len(taken))))
    return KeptPool(tuple(pool.stamps[number] for number in numbers), pool.model, _heads_first(keyed))


def _heads_first(keyed: Keyed) -> Keyed:
    """The same keys and values [R, P, H, K], stored as [R, H, P, K], which stay where they are.

    Each step of decoding reads them once, a head at a time, from memory and not from the caches where a batch has many
    prompts.
    """

    def stored(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(each.transpose(1, 2).contiguous().transpose(1, 2) for each in tensors)

    found = {
        site: SiteKeys(Keys(stored(keys.keys), stored(keys.values), keys.lens), rows)
        for site, (keys, rows) in keyed.items()
    }
    for each in found.values():
        mark_kept(each.keys.keys)
    return found


_KEEPING: weakref.WeakSet[PromptCaches] = weakref.WeakSet()
_KEEPING_LOCK = Lock()  # a set that grows meanwhile cannot be walked through


@cache
def _watch_optimizers() -> None:
    register_optimizer_step_post_hook(_note_step)


def _note_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    if _KEEPING:
        parameters = {id(each) for group in optimizer.param_groups for each in group["params"]}
        with _KEEPING_LOCK:
            keeping = list(_KEEPING)
        for caches in keeping:
            caches.note_step(parameters)

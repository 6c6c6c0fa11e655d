# SPDX-License-Identifier: Apache-2.0
"""KeyKeeper: keys and values of prompts for a batch, and those that are kept for serving."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from fastprompt._allowed import PromptKeys
from fastprompt._evaluating import evaluating
from fastprompt.prompts.bank import Names, Selection
from fastprompt.prompts.cache import PromptCaches
from fastprompt.prompts.cache_loading import load_caches, save_cache
from fastprompt.prompts.config import SITES
from fastprompt.prompts.holder import PromptHolder
from fastprompt.prompts.keyed import Keyed, joined, keyed, to_read
from fastprompt.prompts.sites import serve


class KeyKeeper(PromptHolder):
    """A PromptHolder that has its prompts' keys and values too, computed or kept."""

    def cache_prompts(self, names: str | Iterable[str] | None = None) -> None:
        """Compute the keys and values of prompts once, and keep them: forward without gradient and ``generate`` then
        run the tokens only.

        What is kept is computed again by itself once a tensor of a prompt or of the model has changed, or an adapter;
        writing through ``.data``, and another activation, epsilon or hook, leave no trace: ``drop_caches`` after them.
        Copies of the PromptModel and its files are without it. Used in eval mode; in training mode dropout makes every
        call's keys others.

        Args:
            names: of prompts of kind "cached" or "prefix", one or several, of the bank or of the store attached;
                None: all of the bank's own.

        Raises:
            TypeError: ``names`` is neither a name nor several.
            ValueError: an unknown name, or a prompt of kind "prepend", whose keys depend on the tokens.
        """
        if names is None:
            names = [name for name in self.prompts if self.kind(name) != "prepend"]
        if not isinstance(names, Iterable):
            raise TypeError(f"PromptModel: names must be a prompt's name or several, got {names!r}")
        chosen = [names] if isinstance(names, str) else list(dict.fromkeys(names))
        if not chosen:
            return
        prompts = self._keyed_prompts(chosen)
        with torch.no_grad(), evaluating(self.model):
            self._caches.keep(chosen, prompts, self.model, lambda: keyed(self.model, prompts))

    def drop_caches(self) -> None:
        """Free what ``cache_prompts`` and ``load_caches`` keep."""
        self._caches = PromptCaches()

    @contextmanager
    def keeping(self, names: Names) -> Iterator[None]:
        """Inside a ``with`` block keep the keys and values of prompts of kind "cached" or "prefix", as
        ``cache_prompts`` does, of which none are kept yet. In training mode nothing is kept: dropout makes every call's
        keys different.

        Args:
            names: of any prompts, one or several; None is the first one, as in ``forward``.

        Raises:
            TypeError, ValueError: names that are none, or unknown.
        """
        rows = len(names) if isinstance(names, Sequence) and not isinstance(names, str) else 1
        fresh = [
            name
            for name in self.prompts.select(names, rows).names
            if not self.model.training and self.kind(name) != "prepend" and name not in self._caches.names
        ]
        self.cache_prompts(fresh)
        try:
            yield
        finally:
            self._caches.drop(fresh)

    def save_cache(self, name: str, path: str | os.PathLike[str]) -> None:
        """Write the keys and values of a prompt beside its file, for ``load_caches``: sst2.cache.safetensors.

        Args:
            name: of a prompt of kind "cached" or "prefix".
            path: of the prompt's file, as in ``save_prompt``, such as sst2.safetensors.

        Raises:
            ValueError: no such prompt, one of kind "prepend", or keys that are not finite.
        """
        [prompt] = self._keyed_prompts([name])
        with torch.autocast(self._table().device.type, enabled=False):
            save_cache(path, self.model, self._identity(), prompt)
        self.prompts.trim(self._caches)

    def load_caches(self, paths: Mapping[str, str | os.PathLike[str]]) -> None:
        """Keep the keys and values that ``save_cache`` wrote, in place of computing them as ``cache_prompts`` does.

        Args:
            paths: of the prompts' files, by the prompts' names here; one call for those that batches will mix.

        Raises:
            TypeError: ``paths`` is no mapping.
            FileNotFoundError: there is no cache beside one of them.
            ValueError: no such prompt, one of kind "prepend", or a file that is broken, of another model or dtype, or
                older than the prompt. What was kept before stays.
        """
        if not isinstance(paths, Mapping):
            raise TypeError(
                f"PromptModel: paths must be a dict of prompts' names and files, got {type(paths).__name__}"
            )
        names = list(paths)
        prompts = self._keyed_prompts(names)
        with torch.autocast(self._table().device.type, enabled=False):
            files = list(paths.values())
            make = partial(load_caches, files, self.model, self._identity(), prompts)
            self._caches.keep(names, prompts, self.model, make)

    def _site_keys(
        self, selection: Selection, batch: int, sites: Sequence[str] = SITES
    ) -> dict[str, PromptKeys | None]:
        """The prompts' keys for these sites, computed or kept."""
        serve(self.model)
        fresh = torch.is_grad_enabled() or self.model.training or torch.compiler.is_compiling()
        found = keyed(self.model, selection.prompts) if fresh else self._kept(selection, sites)
        return {site: to_read(self.model, site, found.get(site), selection.ids, batch) for site in sites}

    def _kept(self, selection: Selection, sites: Sequence[str]) -> Keyed:
        """What ``cache_prompts`` keeps, and what it does not computed now."""
        stale = self._caches.stale(dict(zip(selection.names, selection.prompts, strict=True)), self.model)
        self._caches.drop(stale)
        self.cache_prompts([name for name in stale if self.prompts.holds(name)])
        parts, missing = self._caches.parts(selection.names)
        if missing:
            prompts = [selection.prompts[i] for i in missing]
            for site, (keys, rows) in keyed(self.model, prompts).items():
                parts[site].append((keys, dict(zip(missing, rows, strict=True))))
        return {site: joined(parts[site], len(selection.names)) for site in sites if parts[site]}

    def _keyed_prompts(self, names: list[str]) -> list[Any]:
        """The prompts of these names. Raises ValueError if one has no keys of its own."""
        prompts = [self.prompts.find(name) for name in names]
        for name in names:
            if self.kind(name) == "prepend":
                raise ValueError(
                    f"PromptModel: prompt {name!r} is of kind 'prepend': its keys depend on the tokens, so there is "
                    "nothing to keep. Train one of kind 'cached' or 'prefix'"
                )
            self._serve(self.kind(name))
        return prompts

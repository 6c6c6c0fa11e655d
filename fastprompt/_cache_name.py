# SPDX-License-Identifier: Apache-2.0
"""The name of transformers' cache: ``past_key_values``, from transformers 5.24 on ``cache``.

Whoever calls fastprompt may use either. What fastprompt hands on has the name of the version that is installed: the
other one is ignored there, or warned about.
"""

import inspect
from typing import Any

from transformers.models.t5.modeling_t5 import T5Attention

CACHE_NAMES = ("cache", "past_key_values")
CACHE = next(name for name in CACHE_NAMES if name in inspect.signature(T5Attention.forward).parameters)


def rename_cache(arguments: dict[str, Any]) -> None:
    """In place: give a cache among these keyword arguments this version's name. TypeError: it is there under both."""
    given = [arguments.pop(name) for name in CACHE_NAMES if name in arguments]
    caches = [each for each in given if each is not None]
    if len(caches) == 2:
        raise TypeError(
            "PromptModel: cache and past_key_values are one argument in transformers, got both. Give one of them"
        )
    if given:
        arguments[CACHE] = caches[0] if caches else None


def cache_of(output: Any) -> Any:
    """The cache in a model's output, or None."""
    return getattr(output, CACHE)

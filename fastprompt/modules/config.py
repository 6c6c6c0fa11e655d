# SPDX-License-Identifier: Apache-2.0
"""The configuration that a patched stack reads: transformers' own in all but the name of the attention.

T5's stacks choose their masks and their attention by ``config._attn_implementation``. The configuration object may be
the user's, and other models' too, so that name is not written into it. A stack is given a second view of the same
state instead: what is set on one is read from the other.
"""

from copy import copy
from functools import cache
from typing import Any

from transformers import PreTrainedConfig

from fastprompt import hf_attention


class Served:
    """Mixin for a model's configuration class."""

    stock: Any  # the configuration that this is a view of

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """transformers makes another of a configuration's class, to compare it with the defaults: a stock one."""
        return cls.__bases__[1](*args, **kwargs)

    @property
    def _attn_implementation_internal(self) -> str:
        return hf_attention.NAME

    def get_text_config(self, *args: Any, **kwargs: Any) -> Any:
        found = self.stock.get_text_config(*args, **kwargs)  # which the compiler copies in its own way
        return self if found is self.stock else found

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.stock, name, value)  # which may refuse, or set more

    def __reduce__(self) -> tuple[Any, ...]:
        return served_config, (self.stock,)  # deep copies and pickles share their state again

    def __copy__(self) -> Any:
        return served_config(copy(self.stock))


@cache
def _served_class(cls: Any) -> Any:
    return type(f"Fast{cls.__name__}", (Served, cls), {"__module__": __name__, "__slots__": ("stock",)})


def served_config(config: Any) -> Any:
    """``config`` as a patched stack reads it."""
    if isinstance(config, Served):
        return config
    kind: Any = type(config)
    view: Any = object.__new__(_served_class(kind))
    object.__setattr__(view, "__dict__", config.__dict__)
    object.__setattr__(view, "stock", config)
    return view


def stock_config(config: Any) -> Any:
    """``config`` as its model was made with."""
    return config.stock if isinstance(config, Served) else config


def give_config(stack: Any, config: Any) -> None:
    """To the stack, which makes the masks, and to all in it that read the same one: its attention layers.

    Layers with a configuration of their own, as copies of a block have, read a view of that, or that itself again.
    """
    before, given = stack.config, served_config if isinstance(config, Served) else stock_config
    for module in stack.modules():
        own = module.__dict__.get("config")
        if own is before:
            module.config = config
        elif isinstance(own, PreTrainedConfig):
            module.config = given(own)

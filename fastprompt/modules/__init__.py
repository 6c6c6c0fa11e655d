# SPDX-License-Identifier: Apache-2.0
"""Drop-in T5 modules: mixins for Hugging Face's classes, which own no tensors and read their children's at every call.

``fast_class(T5LayerFF)`` is the class ``FastT5LayerFF(FastFF, T5LayerFF)``. patch() gives it to a module, unpatch()
takes it away. A module that cannot run its kernel runs the forward of the class that it was.
"""

import importlib
from functools import wraps
from typing import Any

from torch import nn

from fastprompt._family import FAMILY
from fastprompt.modules.attention import FastCrossAttention, FastSelfAttention
from fastprompt.modules.dropout import FastDropout
from fastprompt.modules.ff import FastFF
from fastprompt.modules.head import FastHead
from fastprompt.modules.lm_loss import FastLoss
from fastprompt.modules.norm import FastNorm

# What is identical in which model. The other classes compute something else.
MIXINS: dict[str, tuple[type, tuple[str, ...]]] = {
    "LayerNorm": (FastNorm, tuple(FAMILY.values())),
    "LayerFF": (FastFF, ("T5", "MT5", "UMT5", "LongT5", "Pop2Piano", "Udop")),
    "LayerSelfAttention": (FastSelfAttention, ("T5", "MT5")),
    "LayerCrossAttention": (FastCrossAttention, ("T5", "MT5")),
    "ForConditionalGeneration": (FastLoss, ("T5", "MT5", "UMT5", "LongT5")),
}
# torch's own classes, of modules in certain places only (tree.swappable): what serves them, and the drop-in's name.
SERVED_TORCH: dict[type, tuple[type, str]] = {
    nn.Dropout: (FastDropout, "FastStackDropout"),
    nn.Linear: (FastHead, "FastLinearHead"),
}


def mixin_for(cls: type) -> type | None:
    """What serves a module of exactly this class; None if nothing does."""
    if cls in SERVED_TORCH:
        return SERVED_TORCH[cls][0]
    if cls.__module__.startswith("transformers.models."):
        for suffix, (mixin, prefixes) in MIXINS.items():
            if cls.__name__.removesuffix(suffix) in prefixes:
                return mixin
    return None


def fast_class(cls: Any) -> type:
    """The drop-in for ``cls``, made once; pickle and deepcopy find it in this module by its name."""
    name = SERVED_TORCH[cls][1] if cls in SERVED_TORCH else f"Fast{cls.__name__}"
    found = globals().get(name)
    if found is None:
        mixin = mixin_for(cls)
        assert mixin is not None
        content = {
            "__module__": __name__,
            "__qualname__": name,
            "stock_class": cls,
            "forward": _forward(mixin, cls),
        }
        # A whole model's files hold its class's name.
        shown = cls.__name__ if mixin is FastLoss else name
        found = globals()[name] = type(shown, (mixin, cls), content)
    return found


def _forward(mixin: Any, cls: Any) -> Any:
    """The mixin's forward. Something may have wrapped it while the module had this class, and call it after unpatch:
    then it is that of the class that the module has had back.
    """

    @wraps(cls.forward)  # Trainer asks a model what it takes
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return (mixin if isinstance(self, mixin) else type(self)).forward(self, *args, **kwargs)

    return forward


def __getattr__(name: str) -> Any:
    """Finds the classes of a model that was pickled in another process."""
    for cls, (_, known) in SERVED_TORCH.items():
        if name == known:
            return fast_class(cls)
    for module, prefix in FAMILY.items():
        for suffix, (_, prefixes) in MIXINS.items():
            if prefix in prefixes and name == f"Fast{prefix}{suffix}":
                stock = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
                return fast_class(getattr(stock, f"{prefix}{suffix}"))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

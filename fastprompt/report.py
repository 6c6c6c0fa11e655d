# SPDX-License-Identifier: Apache-2.0
"""explain: which kernels serve each layer of a T5, or why none does, and what it saves for backward."""

from itertools import chain
from typing import Any, NamedTuple

from torch import nn

from fastprompt.dispatch.backends import backends
from fastprompt.modules import mixin_for
from fastprompt.modules.attention import FastAttention
from fastprompt.modules.ff import FastFF
from fastprompt.modules.head import FastHead
from fastprompt.modules.lm_loss import FastLoss
from fastprompt.modules.tree import check_module, is_family_layer, lm_heads, stock_class, swappable

NOT_CHOSEN = "not patched"


class Row(NamedTuple):
    """One module of the model: the kernels that serve it, or the reason why none does.

    path: as in named_modules; "" is the model itself.
    cls: its class in transformers.
    kernel: the functions it is computed with; None: transformers' own.
    backend: of these functions, where its weights are now, such as "cpu" or "cuda".
    reason: why a call runs transformers' forward; None: it does not. Where a weight is trained: a call of training.
    memory: the policy of what it saves for backward.
    saved: bytes that it saves for backward per row of its input that needs a gradient, beyond what the layer before it
        has saved already; None where that depends on lengths, or is up to torch.
    """

    path: str
    cls: str
    kernel: str | None
    backend: str | None
    reason: str | None
    memory: str | None
    saved: int | None


class Report(list[Row]):
    """The rows of :func:`explain`; prints as a table, equal rows of a stack's blocks together."""

    def __str__(self) -> str:
        groups: dict[tuple[str, ...], list[str]] = {}
        for row in self:
            if row.reason is None:
                saved = "" if row.saved is None else f", saves {row.saved:,} bytes per token"
                what = (f"{row.kernel} ({row.backend})", f"memory={row.memory}{saved}")
            else:
                what = (f"as in transformers: {row.reason}", "")
            groups.setdefault((row.cls, *what), []).append(row.path or "the model")
        lines = []
        for (cls, kernel, memory), paths in groups.items():
            where = paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
            details = "; ".join(filter(None, (where, memory)))
            lines.append(f"{cls:24} x{len(paths):<3} {kernel}\n{'':29} {details}")
        served = sum(row.reason is None for row in self)
        return "\n".join([*lines, f"{served} of {len(self)} modules run fastprompt's kernels"])


def explain(model: nn.Module) -> Report:
    """Which kernels serve each layer of a T5, or why none does. Print it.

    A served layer may still fall back in one call, for what only the call knows: a cache that is not
    transformers' own, autocast, a mask of the user's own, attention weights as output.

    Args:
        model: a T5, or what holds one, patched or not.

    Returns:
        A row per layer that could be served, in the model's order; as text, equal rows are one.

    Raises:
        TypeError: model is no torch.nn.Module.
    """
    check_module("explain", model)
    report, listed = Report(), {id(module) for module in (*swappable(model), *lm_heads(model))}
    module: Any
    attended: set[str] = set()  # blocks with a served attention layer, which the layers behind it read from
    whole: set[str] = set()  # served layers, which compute their norms themselves
    for path, module in model.named_modules():
        stock = stock_class(type(module))
        if id(module) not in listed and not is_family_layer(stock):
            continue
        if type(module) is not stock:
            reason, parent = module.fastprompt_obstacle(), path.rpartition(".")[0]
            saved = None
            if reason is None:
                saved = 0 if parent in whole else module.fastprompt_saved(parent in attended)
                if isinstance(module, FastAttention):
                    attended.add(parent)
                if isinstance(module, FastAttention | FastFF):
                    whole.add(path)
            memory = module.fastprompt_memory
            backend = _backend(module, model.get_submodule(parent))
            report.append(Row(path, stock.__name__, module.kernel, backend, reason, memory, saved))
        elif mixin_for(stock) is not FastLoss:
            report.append(Row(path, stock.__name__, None, None, _why_stock(module), None, None))
    return report


def _why_stock(module: Any) -> str:
    if mixin_for(type(module)) is None:
        return "it computes something else than T5's"
    if "forward" in module.__dict__:
        return "its forward is wrapped, by accelerate for example: patch before"
    return NOT_CHOSEN


def _backend(module: nn.Module, parent: nn.Module) -> str:
    """Of the op that is most of it. Dropout has no weight: its parent's says where it runs."""
    weight = next(chain(module.parameters(), parent.parameters()), None)
    device = "cpu" if weight is None or weight.is_meta else weight.device.type
    if device not in ("cpu", "cuda"):
        return "reference"
    if isinstance(module, FastAttention):  # CUDA C++ has it for decoding alone
        return next(name for name in backends("t5_attention", device) if name != "cuda")
    return backends("frozen_linear" if isinstance(module, FastHead) else "rms_norm", device)[0]

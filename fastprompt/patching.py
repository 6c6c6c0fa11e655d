# SPDX-License-Identifier: Apache-2.0
"""patch: a Hugging Face T5 whose layers run fused kernels; unpatch: as it was; explain: which layer runs what."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

from torch import nn
from transformers import PreTrainedModel

from fastprompt import hf_attention
from fastprompt.modules import FAMILY, MIXINS, fast_class, mixin_for
from fastprompt.modules.attention import FastAttention, FastSelfAttention
from fastprompt.modules.config import served_config, stock_config
from fastprompt.modules.dropout import FastDropout
from fastprompt.modules.ff import FastFF
from fastprompt.modules.norm import FastNorm

MEMORY = ("speed", "balanced", "lean", "minimal")
ON_UNSUPPORTED = ("fallback", "warn", "error")
M = TypeVar("M", bound=nn.Module)


class Row(NamedTuple):
    """One module of the model: the kernels that serve it, or the reason why none does."""

    path: str
    cls: str
    kernel: str | None
    reason: str | None


class Report(list[Row]):
    """The rows of :func:`explain`; prints as a table, equal rows of a stack's blocks together."""

    def __str__(self) -> str:
        groups: dict[tuple[str, str], list[str]] = {}
        for row in self:
            what = row.kernel if row.reason is None else f"as in transformers: {row.reason}"
            groups.setdefault((row.cls, str(what)), []).append(row.path)
        lines = []
        for (cls, what), paths in groups.items():
            where = paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
            lines.append(f"{cls:24} x{len(paths):<3} {what}\n{'':29} {where}")
        served = sum(row.reason is None for row in self)
        return "\n".join([*lines, f"{served} of {len(self)} modules run fastprompt's kernels"])


def patch(
    model: M,
    *,
    attention: bool = True,
    norm: bool = True,
    ff: bool = True,
    memory: str = "balanced",
    on_unsupported: str = "fallback",
) -> M:
    """Swap the layers of a frozen T5 for fused ones, in place. What the model computes does not change.

    Only classes are swapped, of leaf modules: parameters, buffers, state_dict keys, hooks and configuration files stay.
    A layer that a kernel does not cover (a weight that is trained, LoRA, quantised or offloaded; a cache; autocast;
    attention weights as output) runs transformers' forward, and :func:`explain` says which and why. Dropout draws
    other masks than torch's, of the same probability. Patching again changes the options.

    Args:
        model: a T5, v1.1, FLAN, ByT5, UL2 or mT5 of any class, or anything that contains one: a PeftModel, a
            PromptModel. Of UMT5, LongT5, Pop2Piano, UDOP and Switch the layers that equal T5's are swapped.
        attention: the attention layers, and ``attn_implementation="fastprompt"``.
        norm: the norms, and the stacks' dropout.
        ff: the feed-forward layers.
        memory: what is kept for backward, all of it exact: "speed" computes nothing twice; "balanced" computes the
            feed-forward layers' first products and the residual stream inside a block again; "lean" also q, k and v;
            "minimal" also the attention, and keeps nothing but each block's input.
        on_unsupported: "fallback", "warn" or "error" where a layer cannot be served.

    Returns:
        ``model``.

    Raises:
        TypeError: model is no module.
        ValueError: an option is unknown, there is no T5 in the model, or a layer is unsupported and that is an error.
    """
    _check_options(model, memory, on_unsupported)
    wanted = {FastAttention: attention, FastNorm: norm, FastDropout: norm, FastFF: ff}
    if not any(mixin_for(_stock(type(module))) not in (None, FastDropout) for module in model.modules()):
        raise ValueError(
            f"fastprompt.patch: model must contain a T5 ({', '.join(FAMILY)}), got {type(model).__name__} without any"
            " of their layers"
        )
    bias: tuple[Any, ...] = ()
    for module in _leaves(model):
        own = getattr(module, "SelfAttention", None)
        bias = (own,) if getattr(own, "has_relative_attention_bias", False) else bias
        mixin = mixin_for(_stock(type(module)))
        chosen = mixin is not None and any(on and issubclass(mixin, base) for base, on in wanted.items())
        if chosen and "forward" not in module.__dict__:
            module.__class__ = fast_class(_stock(type(module)))
            module.fastprompt_memory = memory  # type: ignore[assignment]
            if bias and isinstance(module, FastSelfAttention):
                module.fastprompt_bias = bias
        elif not chosen:
            _restore(module)
    for stack in _stacks(model):
        _give_config(stack, (served_config if attention else stock_config)(stack.config))
    if on_unsupported != "fallback":
        missed = [row for row in explain(model) if row.reason is not None and row.reason != NOT_CHOSEN]
        if missed:
            listed = "; ".join(f"{row.path}: {row.reason}" for row in missed[:5])
            message = f"fastprompt.patch: {len(missed)} modules stay as in transformers. {listed}"
            if on_unsupported == "error":
                unpatch(model)
                raise ValueError(message)
            warnings.warn(message, stacklevel=2)
    return model


def unpatch(model: M) -> M:
    """The inverse of :func:`patch`: every module has its class back. Harmless on a model that is not patched."""
    for module in model.modules():
        _restore(module)
    for stack in _stacks(model):
        _give_config(stack, stock_config(stack.config))
    return model


@contextmanager
def patched(model: M, **options: Any) -> Iterator[M]:
    """A ``with`` block in which ``model`` is patched, with the options of :func:`patch`."""
    patch(model, **options)
    try:
        yield model
    finally:
        unpatch(model)


NOT_CHOSEN = "not patched"


def explain(model: nn.Module) -> Report:
    """Which kernels serve each layer of a T5, or why none does. Print it.

    A served layer may still fall back in one call, for what only the call knows: a cache, autocast, a mask of the
    user's own, attention weights as output.
    """
    report, leaves = Report(), set(map(id, _leaves(model)))
    for path, module in model.named_modules():
        cls = type(module)
        if id(module) not in leaves and not _family_layer(cls):
            continue
        stock = _stock(cls)
        if cls is not stock:
            reason = module.fastprompt_obstacle()  # type: ignore[operator]
            report.append(Row(path, stock.__name__, cls.kernel, reason))
        elif mixin_for(stock) is None:
            report.append(Row(path, stock.__name__, None, "it computes something else than T5's"))
        else:
            wrapped = "its forward is wrapped, by accelerate for example: patch before"
            report.append(
                Row(path, stock.__name__, None, wrapped if "forward" in module.__dict__ else NOT_CHOSEN)
            )
    return report


def _check_options(model: object, memory: str, on_unsupported: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"fastprompt.patch: model must be a torch.nn.Module, got {type(model).__name__}")
    for name, value, choices in (
        ("memory", memory, MEMORY),
        ("on_unsupported", on_unsupported, ON_UNSUPPORTED),
    ):
        if value not in choices:
            raise ValueError(f"fastprompt.patch: {name} must be one of {', '.join(choices)}, got {value!r}")


def _stock(cls: Any) -> type:
    return getattr(cls, "stock_class", cls)


def _family_layer(cls: type) -> bool:
    """A norm, feed-forward or attention layer of the family, swapped or not."""
    name = _stock(cls).__name__
    inside = _stock(cls).__module__.split(".")[2:3]
    return inside[:1] != [] and inside[0] in FAMILY and name.endswith(tuple(MIXINS))


def _leaves(model: nn.Module) -> Iterator[nn.Module]:
    """What may be swapped: the family's layers, and the dropout of a stack itself."""
    for module in model.modules():
        if mixin_for(_stock(type(module))) is not None and not isinstance(module, nn.Dropout):
            yield module
    for stack in _stacks(model):
        dropout = getattr(stack, "dropout", None)
        if dropout is not None and _stock(type(dropout)) is nn.Dropout:
            yield dropout


def _stacks(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        if (
            isinstance(module, PreTrainedModel)
            and type(module).__name__.endswith("Stack")
            and module.config.model_type in hf_attention.SERVED
        ):
            yield module


def _restore(module: nn.Module) -> None:
    if _stock(type(module)) is not type(module):
        module.__class__ = _stock(type(module))
        for name in ("fastprompt_memory", "fastprompt_bias"):
            module.__dict__.pop(name, None)


def _give_config(stack: Any, config: Any) -> None:
    """To the stack, which makes the masks, and to all in it that read the same one: its attention layers."""
    before = stack.config
    for module in stack.modules():
        if module.__dict__.get("config") is before:
            module.config = config

# SPDX-License-Identifier: Apache-2.0
"""patch: a Hugging Face T5 whose layers run fused kernels; unpatch: as it was."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from fastprompt._family import FAMILY
from fastprompt._warn import warn
from fastprompt.modules import SERVED_TORCH, fast_class, mixin_for
from fastprompt.modules.attention import FastAttention, FastSelfAttention
from fastprompt.modules.config import give_config, served_config, stock_config
from fastprompt.modules.dropout import FastDropout
from fastprompt.modules.ff import FastFF
from fastprompt.modules.head import FastHead
from fastprompt.modules.lm_loss import FastLoss
from fastprompt.modules.norm import FastNorm
from fastprompt.modules.tree import bias_owners, check_module, lm_heads, stacks, stock_class, swappable
from fastprompt.report import NOT_CHOSEN, explain

MEMORY = ("speed", "balanced", "lean", "minimal")
LEAN_BLOCKS = 4  # of so many, "lean" lets one keep its attention's output
ON_UNSUPPORTED = ("fallback", "warn", "error")
OPTIONS = ("fastprompt_memory", "fastprompt_bias")  # of a swapped module, beside its class
M = TypeVar("M", bound=nn.Module)


def patch(
    model: M,
    *,
    attention: bool = True,
    norm: bool = True,
    ff: bool = True,
    head: bool = True,
    lm_loss: bool = False,
    memory: str = "balanced",
    on_unsupported: str = "fallback",
) -> M:
    """Swap the layers of a frozen T5 for fused ones, in place. What the model computes does not change.

    Only classes are swapped, of norms, feed-forward and attention layers, the stacks' dropout, the head and, with
    ``lm_loss``, the model itself: parameters, buffers, state_dict keys, hooks and configuration files stay.
    A layer that a kernel does not cover (a weight that is trained, LoRA, quantised or offloaded) runs transformers'
    forward, and :func:`explain` says which and why; so does a call under autocast, with a cache that is not
    transformers' own or with attention weights as output, of which explain cannot know. A layer whose weights could
    train runs kernels in an evaluation, in ``eval()`` and without gradients. Dropout draws other masks than torch's, of
    the same probability. Patching again changes the options.

    Args:
        model: a T5, v1.1, FLAN, ByT5, UL2 or mT5 of any class, or anything that contains one: a PeftModel, a
            PromptModel. Of UMT5, LongT5, Pop2Piano, UDOP and Switch the layers that equal T5's are swapped.
        attention: the attention layers, and ``attn_implementation="fastprompt"``.
        norm: the norms, and the stacks' dropout.
        ff: the feed-forward layers.
        head: the product of the language-model head, on a CPU.
        lm_loss: where gradients are recorded, the loss of labels without the logits of the whole vocabulary, which are
            then missing in the output.
        memory: what is kept for backward, all of it exact: "speed" computes nothing twice; "balanced" computes the
            feed-forward layers' first products and the residual stream inside a block again; "lean" also q, k and v,
            and in three blocks of four the attention; "minimal" in all of them, and keeps nothing but each block's
            input.
        on_unsupported: "fallback", "warn" or "error" where a layer cannot be served. A language-model head that
            another library has put in never counts.

    Returns:
        ``model``.

    Raises:
        TypeError: model is no module.
        ValueError: an option is unknown, there is no T5 in the model, or a layer is unsupported and that is an error.
    """
    before = _Patched(model)
    _check_options(memory, on_unsupported)
    wanted = {
        FastAttention: attention,
        FastNorm: norm,
        FastDropout: norm,
        FastFF: ff,
        FastHead: head,
        FastLoss: lm_loss,
    }
    classes = {stock_class(type(module)) for module in model.modules()}
    if not any(mixin_for(cls) is not None for cls in classes.difference(SERVED_TORCH)):
        raise ValueError(
            f"fastprompt.patch: model must contain a T5 ({', '.join(FAMILY)}), got {type(model).__name__} without any"
            " of their layers"
        )
    owners = bias_owners(model)
    blocks = 0
    for module in swappable(model):
        mixin = mixin_for(stock_class(type(module)))
        chosen = mixin is not None and any(on and issubclass(mixin, base) for base, on in wanted.items())
        if chosen and "forward" not in module.__dict__:
            module.__class__ = fast_class(stock_class(type(module)))
            blocks += isinstance(module, FastSelfAttention)
            attends = isinstance(module, FastAttention)
            module.fastprompt_memory = _policy(memory, blocks) if attends else memory  # type: ignore[assignment]
            if isinstance(module, FastSelfAttention):
                module.fastprompt_bias = owners[module]
        elif not chosen:
            _restore(module)
    for stack in stacks(model):
        give_config(stack, (served_config if attention else stock_config)(stack.config))
    if on_unsupported != "fallback":
        missed = _missed(model, lm_loss)
        if missed:
            message = (
                f"fastprompt.patch: {len(missed)} modules stay as in transformers. {'; '.join(missed[:5])}"
            )
            if on_unsupported == "error":
                before.put_back(model)
                raise ValueError(message)
            warn(message)
    return model


def unpatch(model: M) -> M:
    """The inverse of :func:`patch`: every module has its class back. Harmless on a model that is not patched.

    Raises:
        TypeError: model is no torch.nn.Module.
    """
    check_module("unpatch", model)
    for module in model.modules():
        _restore(module)
    for stack in stacks(model):
        give_config(stack, stock_config(stack.config))
    return model


@contextmanager
def patched(model: M, **options: Any) -> Iterator[M]:
    """A ``with`` block in which ``model`` is patched, with the options of :func:`patch`; behind it, it is as before.

    Raises:
        TypeError, ValueError: what :func:`patch` raises; the model is then as before.
    """
    before = _Patched(model)
    patch(model, **options)
    try:
        yield model
    finally:
        before.put_back(model)


class _Patched:
    """How a model is patched, or that it is not."""

    def __init__(self, model: nn.Module) -> None:
        check_module("patch", model)
        self.modules = [
            (module, type(module), {name: vars(module)[name] for name in OPTIONS if name in vars(module)})
            for module in model.modules()
        ]
        self.configs = [(stack, stack.config) for stack in stacks(model)]

    def put_back(self, model: nn.Module) -> None:
        unpatch(model)
        for module, cls, options in self.modules:
            if type(module) is stock_class(cls):  # and nothing else since
                module.__class__ = cls
                vars(module).update(options)
        for stack, config in self.configs:
            if config is not stock_config(config):
                give_config(stack, served_config(stack.config))


def _policy(memory: str, block: int) -> str:
    """That of the attention layers of a block, counted from 1."""
    return "minimal" if memory == "lean" and block % LEAN_BLOCKS != 1 else memory


def _missed(model: nn.Module, lm_loss: bool) -> list[str]:
    """What was chosen and stays as in transformers, with the reason. A head may always be another's."""
    ignored = list(lm_heads(model))
    missed = [
        f"{row.path}: {row.reason}"
        for row in explain(model)
        if row.reason not in (None, NOT_CHOSEN) and model.get_submodule(row.path) not in ignored
    ]
    if lm_loss and not any(isinstance(module, FastLoss) for module in model.modules()):
        missed.append(f"lm_loss: {type(model).__name__} has no loss that is known to be T5's own")
    return missed


def _check_options(memory: str, on_unsupported: str) -> None:
    for name, value, choices in (
        ("memory", memory, MEMORY),
        ("on_unsupported", on_unsupported, ON_UNSUPPORTED),
    ):
        if value not in choices:
            raise ValueError(f"fastprompt.patch: {name} must be one of {', '.join(choices)}, got {value!r}")


def _restore(module: nn.Module) -> None:
    cls = type(module)
    stock = stock_class(cls)
    if stock is cls and is_parametrized(module):
        stock = _parametrized_anew(cls)
    if stock is not cls:
        module.__class__ = stock
        for name in OPTIONS:
            module.__dict__.pop(name, None)


def _parametrized_anew(cls: type) -> type:
    """The class that torch makes of a module's own when a parameter is parametrized, of the stock one."""
    bases = tuple(map(stock_class, cls.__bases__))
    if bases == cls.__bases__:
        return cls
    added = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    return type(f"Parametrized{bases[0].__name__}", bases, added)

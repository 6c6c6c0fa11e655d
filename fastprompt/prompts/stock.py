# SPDX-License-Identifier: Apache-2.0
"""A stock encoder that attends by "fastprompt" for one call: what packed rows need of a model that nobody patched.

The model does not change, so that other threads, the next call, and a checkpoint that computes its layers again in the
backward pass meet what they know. The call runs a view: the stack and what leads to its attention layers are copies
with another configuration, and all else (parameters, norms, projections, feed-forward layers) is the model's own.

Whatever somebody has added to the encoder may read the mask or count on [B, L, D], and is not given packed rows.
"""

import sys
from typing import Any

import torch
from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fastprompt._hooks import collects_outputs, has_global_hooks
from fastprompt._tensors import parts_of
from fastprompt.dispatch.backends import backends
from fastprompt.modules.config import served_config

# Modules that treat a row alike in every batch: these of torch's, and all of transformers' and of LoRA's.
ROW_WISE = {
    nn.Dropout, nn.Embedding, nn.GELU, nn.Identity, nn.Linear, nn.ModuleDict, nn.ModuleList, nn.ParameterDict,
    nn.ReLU, nn.Sequential, nn.SiLU,
}  # fmt: skip
FOREIGN = ("transformers.", "peft.tuners.lora.")
OWN = ("torch.", *FOREIGN)  # where the methods of such modules are defined
METHODS = {"forward", "compute_bias", "_relative_position_bucket"}
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
REMEDY = "If what was added works row by row, call fastprompt.patch(model)"


def obstacle(encoder: Any, device: torch.device) -> str | None:
    """Why this encoder cannot be run so; None if it can. It is of a type in SERVED."""
    used = encoder.config._attn_implementation_internal
    if not _attends_as_transformers(encoder, used):
        return f'needs transformers\' own "eager" or "sdpa" as attention, got {used!r}. Call fastprompt.patch(model)'
    kernel = "triton" if device.type == "cuda" else "cpu"  # that serves packed rows
    if kernel not in backends("t5_attention", device.type):
        return f"needs the {kernel} kernel of t5_attention on {device.type}, which is not installed"
    if has_global_hooks():
        return "needs modules without global hooks, got some"
    modules, lookup = [encoder], encoder.embed_tokens  # which sees tokens before they are rows
    for module in modules:
        found = _added(module)
        if found is not None:
            name = next(name for name, each in encoder.named_modules() if each is module) or "encoder"
            return f"needs the encoder as transformers made it, got {found} in {name}. {REMEDY}"
        modules += [each for each in module._modules.values() if each not in (None, lookup)]
    for kind in set(map(type, modules)):
        for name in METHODS:
            if not _is_own(getattr(kind, name, None)):
                return f"needs the encoder as transformers made it, got a changed {kind.__name__}.{name}. {REMEDY}"
    for block in encoder.block:
        if block.layer[0].SelfAttention.config is not encoder.config:
            return f"needs attention layers that read the encoder's configuration, got one of their own. {REMEDY}"
    return None


def _attends_as_transformers(encoder: Any, used: Any) -> bool:
    eager = getattr(sys.modules[type(encoder).__module__], "eager_attention_forward", None)
    functions = (ALL_ATTENTION_FUNCTIONS.get(used), ALL_MASK_ATTENTION_FUNCTIONS.get(used), eager)
    return used in ("eager", "sdpa") and all(map(_is_own, functions))


def _is_own(function: Any) -> bool:
    return function is None or (getattr(function, "__module__", None) or "").startswith(OWN)


def _added(module: nn.Module) -> str | None:
    kind, state = type(module), vars(module)
    if kind not in ROW_WISE and not kind.__module__.startswith(FOREIGN):
        return f"a {kind.__name__}"
    shadowed = METHODS & state.keys()
    if shadowed:
        return f"a {shadowed.pop()} of its own"
    for parameter in module._parameters.values():
        if parts_of(parameter):
            return f"a {type(parameter).__name__}"
    if module._compiled_call_impl is not None:
        return "a compiled call"
    for hooks in HOOKS:
        if state[hooks] and not all(map(collects_outputs, state[hooks].values())):
            return "a hook"
    return None


def attending(encoder: Any) -> Any:
    """A view of the encoder whose attention is "fastprompt"."""
    config = served_config(encoder.config)
    blocks = [_with_attention(block, config) for block in encoder.block]
    numbered = {str(i): block for i, block in enumerate(blocks)}
    return _copy(encoder, {"block": _copy(encoder.block, numbered)}, config=config)


def _with_attention(block: Any, config: Any) -> Any:
    layer = block.layer[0]
    attention = _copy(layer.SelfAttention, {}, config=config)
    return _copy(block, {"layer": _copy(block.layer, {"0": _copy(layer, {"SelfAttention": attention})})})


def _copy(module: nn.Module, children: dict[str, nn.Module], **attributes: Any) -> Any:
    """A module with the same state, but for these."""
    copy = object.__new__(type(module))
    copy.__dict__ = vars(module) | {"_modules": module._modules | children} | attributes
    return copy

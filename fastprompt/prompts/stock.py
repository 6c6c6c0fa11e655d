# SPDX-License-Identifier: Apache-2.0
"""A stock encoder that attends by "fastprompt" for one call: what packed rows need of a model that nobody patched.

The model does not change, so that other threads, the next call, and a checkpoint that computes its layers again in the
backward pass meet what they know. The call runs a view: the stack and what leads to its attention layers are copies
with another configuration, and all else (parameters, norms, projections, feed-forward layers) is the model's own.

Whatever somebody has added to the encoder may read the mask or count on [B, L, D], and is not given packed rows.
"""

from typing import Any

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fastprompt._op import backends
from fastprompt.modules.config import served_config

# Where the classes are defined whose modules do to a row what they would do to it in any other batch.
ROW_BY_ROW = (
    "transformers.",
    "torch.nn.modules.activation",
    "torch.nn.modules.container",
    "torch.nn.modules.dropout",
    "torch.nn.modules.linear",
    "torch.nn.modules.sparse",
    "peft.tuners.lora.",
    "bitsandbytes.nn.",
)
STOCK = {"eager": None, "sdpa": sdpa_attention_forward}  # what transformers has by these names
REMEDY = "Call fastprompt.patch(model), which packs all the same"
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def obstacle(encoder: Any, device: torch.device) -> str | None:
    """Why this encoder cannot be run so; None if it can. It is of a type in hf_attention.SERVED."""
    used = encoder.config._attn_implementation_internal
    if used not in STOCK or ALL_ATTENTION_FUNCTIONS.get(used) is not STOCK[used]:
        return f'needs transformers\' own "eager" or "sdpa" as attention, got {used!r}. {REMEDY}'
    if backends("t5_attention", device.type)[0] == "reference":
        return f"needs a kernel of t5_attention on {device.type}, got its reference alone"
    modules, lookup = [encoder], encoder.embed_tokens  # which sees tokens before they are rows
    for module in modules:
        found = _added(module)
        if found is not None:
            name = next(name for name, each in encoder.named_modules() if each is module) or "encoder"
            return f"needs the encoder as transformers made it, got {found} in {name}. {REMEDY}"
        modules += [each for each in module._modules.values() if each not in (None, lookup)]
    for block in encoder.block:
        if block.layer[0].SelfAttention.config is not encoder.config:
            return f"needs attention layers that read the encoder's configuration, got one of their own. {REMEDY}"
    return None


def _added(module: nn.Module) -> str | None:
    kind, state = type(module), vars(module)
    if not kind.__module__.startswith(ROW_BY_ROW):
        return f"a {kind.__name__}"
    if "forward" in state:
        return "a forward of its own"
    if module._compiled_call_impl is not None:
        return "a compiled call"
    for hooks in HOOKS:
        if state[hooks] and not all(map(_is_transformers, state[hooks].values())):
            return "a hook"
    return None


def _is_transformers(hook: Any) -> bool:
    """Its own hooks collect outputs, which nobody asks for in a packed call."""
    return getattr(hook, "__module__", "").startswith("transformers.")


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

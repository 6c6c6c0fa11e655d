# SPDX-License-Identifier: Apache-2.0
"""Is a module hooked: who is called with its input or output beside its forward?"""

from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module


def is_hooked(module: nn.Module) -> bool:
    """Would anything but its class's forward see a call?"""
    own = module.__dict__
    return bool(
        "forward" in own
        or own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
    )


def is_watched(module: nn.Module) -> bool:
    """Is somebody's hook given its input or output?"""
    hooks = module._forward_hooks
    return bool(module._forward_pre_hooks or (hooks and not all(map(collects_outputs, hooks.values()))))


def has_global_hooks() -> bool:
    """Are there hooks on all modules?"""
    return bool(
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


def collects_outputs(hook: Any) -> bool:
    """transformers leaves such hooks in a model; they do nothing unless a call asks for what they collect."""
    return getattr(hook, "__module__", "") == "transformers.utils.output_capturing"

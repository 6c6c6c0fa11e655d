# SPDX-License-Identifier: Apache-2.0
"""fastprompt: fused kernels for prompt tuning a frozen Hugging Face T5."""

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fastprompt import hf_attention as hf_attention
from fastprompt import ops
from fastprompt.dispatch.backends import backend_used, backends, use_backend
from fastprompt.graphs import graphed
from fastprompt.model import PromptModel
from fastprompt.patching import patch, patched, unpatch
from fastprompt.prompts import PromptConfig
from fastprompt.report import explain

try:
    __version__ = version("fastprompt")
except PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "0+unknown"

__all__ = [
    "PromptConfig",
    "PromptModel",
    "backend_used",
    "backends",
    "explain",
    "graphed",
    "ops",
    "patch",
    "patched",
    "training",
    "unpatch",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    if name == "training":  # when it is asked for: it is of a layer above
        return importlib.import_module("fastprompt.training")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

# SPDX-License-Identifier: Apache-2.0
"""What transformers' stacks give beside their last hidden state, where it is asked for."""

from collections.abc import Mapping
from typing import Any

OUTPUT_FLAGS = ("output_attentions", "output_hidden_states")


def asks_for(name: str, arguments: Mapping[str, Any], config: Any) -> bool:
    """Does a call ask for it, or else the configuration? As in transformers' capture_outputs."""
    return bool(arguments.get(name, getattr(config, name, False)))


def extra_output(arguments: Mapping[str, Any], config: Any) -> str | None:
    """The first that is asked for; None: none."""
    return next((name for name in OUTPUT_FLAGS if asks_for(name, arguments, config)), None)

# SPDX-License-Identifier: Apache-2.0
"""What transformers' stacks give beside their last hidden state, where it is asked for."""

from collections.abc import Mapping
from typing import Any

OUTPUT_FLAGS = ("output_attentions", "output_hidden_states")


def extra_output(arguments: Mapping[str, Any], config: Any) -> str | None:
    """The first that a call asks for, or its stack's configuration; None: none."""
    return next((name for name in OUTPUT_FLAGS if arguments.get(name, getattr(config, name, False))), None)

# SPDX-License-Identifier: Apache-2.0
"""What a call of transformers' generate will do."""

from typing import Any


def generation_option(model: Any, kwargs: dict[str, Any], name: str, default: Any) -> Any:
    """As generate resolves it: the keyword, else the given generation config's, else that of the model's own."""
    configs = (kwargs.get("generation_config"), model.generation_config)
    found = (kwargs.get(name), *(getattr(config, name, None) for config in configs))
    return next((value for value in found if value is not None), default)

# SPDX-License-Identifier: Apache-2.0
"""The language-model head by frozen_linear, on a CPU: in generation it reads as many weights as some decoders.

Elsewhere, in a dtype that the kernel leaves to PyTorch, and where something else than its weight decides what it
computes, it runs nn.Linear's forward.
"""

from torch import Tensor

from fastprompt.modules._frozen import linear
from fastprompt.modules._ready import obstacle, ready
from fastprompt.ops.frozen_linear import takes


class FastHead:
    """Mixin for the nn.Linear that is a model's lm_head."""

    kernel = "frozen_linear"
    weight: Tensor

    def fastprompt_obstacle(self) -> str | None:
        found, weight = obstacle({"lm_head": self}), self.weight
        if found is None and (weight.device.type != "cpu" or not takes(weight.dtype)):
            return f"lm_head.weight is {weight.dtype} on {weight.device.type}, which nn.Linear does as fast"
        return found

    def fastprompt_saved(self, attended: bool) -> int:
        """Bytes per row."""
        return 0

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        x = input
        if x.device.type != "cpu" or not takes(x.dtype) or ready({"lm_head": self}, {}, x) is None:
            return super().forward(x)  # type: ignore[misc]
        return linear(x, self.weight)

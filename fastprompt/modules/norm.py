# SPDX-License-Identifier: Apache-2.0
"""T5LayerNorm by rms_norm."""

from typing import Any

from torch import Tensor

from fastprompt.modules._made import Made, leave_made
from fastprompt.modules._ready import is_followed, obstacle
from fastprompt.ops._checks import FLOATS
from fastprompt.ops.rms_norm import rms_norm


class FastNorm:
    """Mixin for T5LayerNorm: y = w * x / rms(x). Saves the input and one fp32 per row."""

    kernel = "rms_norm"
    weight: Any
    variance_epsilon: float

    def fastprompt_obstacle(self) -> str | None:
        return obstacle({"norm": self})

    def fastprompt_saved(self, attended: bool) -> int:
        """Bytes per row."""
        return int(self.weight.nbytes) + 4

    def forward(self, hidden_states: Tensor) -> Tensor:
        found = obstacle({"norm": self}, inputs=(hidden_states,))
        if found is not None or hidden_states.dtype not in FLOATS or is_followed():
            return super().forward(hidden_states)  # type: ignore[misc]
        y = rms_norm(hidden_states, self.weight, self.variance_epsilon)
        assert isinstance(y, Tensor)
        leave_made(y, Made(hidden_states, self.weight, None, self.variance_epsilon, 0.0))
        return y

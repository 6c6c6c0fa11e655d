# SPDX-License-Identifier: Apache-2.0
"""Adafactor as the released prompt-tuning code runs it on 100 rows, which neither PyTorch's nor transformers' can.

Both factor the second moments of every 2-D parameter; T5X only where both dimensions are 128 or more.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class Adafactor(torch.optim.Optimizer):
    """Adafactor (Shazeer and Stern 2018) with whole second moments, no momentum and no scaling by the parameter.

    Per parameter, with t = 1, 2, ... the number of the step:

        v = d v + (1 - d) (g^2 + 1e-30),  d = 1 - t^-0.8
        u = g / sqrt(v);  u = u / max(1, rms(u) / clip)
        p = (1 - weight_decay) p - lr u

    which are T5X's formulas under the prompt-tuning recipe's settings. The decay is not multiplied by the rate. A
    constant factor of the loss makes no difference.

    Args:
        params: as for any optimiser of PyTorch; float32 or float64.
        lr: constant; the paper's default is 0.3.
        weight_decay: per step; the paper's is 1e-5.
        decay: the exponent above, more than 0.
        clip: the largest root mean square of u.
        steps_before: the t to begin behind. The released code seems to count on from its checkpoint's 1,100,000: v is
            all but a sum then, and every update is clipped to the same size.

    Raises:
        TypeError, ValueError: a number is none or out of its range, or a parameter is of another dtype.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.3,
        *,
        weight_decay: float = 1e-5,
        decay: float = 0.8,
        clip: float = 1.0,
        steps_before: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "decay": decay,
            "clip": clip,
            "steps_before": steps_before,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As PyTorch has it. TypeError, ValueError: as in the constructor; nothing is added then."""
        # Added first: PyTorch knows all that "params" may be, such as a tensor, an iterator, or pairs with names.
        super().add_param_group(param_group)
        try:
            _check_group(self.param_groups[-1])
        except Exception:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step. ``closure``, if given, computes the loss anew, and is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, parameter.grad, group)
        return loss

    def _step(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        if gradient.is_sparse:
            raise ValueError("Adafactor: a gradient is sparse. Make the embedding with sparse=False")
        state = self.state[parameter]
        if not state:
            state["step"], state["moment"] = 0, torch.zeros_like(parameter)
        state["step"] += 1
        t = group["steps_before"] + state["step"]
        fresh = t ** -group["decay"]  # 1 - d: the first step forgets the zeros
        state["moment"].lerp_(gradient.square().add_(1e-30), fresh)
        update = gradient / state["moment"].sqrt()
        size = update.square().mean().sqrt()
        update /= (size / group["clip"]).clamp_(min=1.0)  # stays on the device: the host waits for nothing
        parameter.mul_(1.0 - group["weight_decay"]).sub_(update, alpha=group["lr"])


def _check_group(group: dict[str, Any]) -> None:
    for name in ("lr", "weight_decay", "decay", "clip", "steps_before"):
        value, positive = group[name], name in ("decay", "clip")
        if not (value > 0 if positive else 0 <= value < math.inf):
            wanted = "more than 0" if positive else "a finite number of 0 or more"
            raise ValueError(f"Adafactor: {name} must be {wanted}, got {value}")
    for parameter in group["params"]:
        if parameter.dtype not in (torch.float32, torch.float64):  # fewer bits would lose small steps
            raise ValueError(f"Adafactor: parameters must be float32 or float64, got {parameter.dtype}")

# SPDX-License-Identifier: Apache-2.0
"""relu_dropout beside torch's ReLU and dropout; forward + backward, as T5 v1.0 has them."""

import torch
from _elementwise import Elementwise
from _harness import main
from torch import Tensor, nn

from fastprompt.ops import relu_dropout


def fused(p: float, x: Tensor) -> Tensor:
    return relu_dropout(x, dropout_p=p)


def in_hf(p: float, x: Tensor) -> Tensor:
    return nn.functional.dropout(torch.relu(x), p)


OP = Elementwise(
    "relu_dropout",
    "forward + backward",
    fused,
    "torch relu, dropout",
    in_hf,
    leaves=1,
    tensors=4,  # x, y; dy, dx
    goal={"B": 8, "L": 356, "F": 3072},
    others=({"B": 1, "L": 356, "F": 2048}, {"B": 8, "L": 356, "F": 2048}),
)
specs, contenders, build = OP.specs, OP.contenders, OP.build


def test_alone(time_alone):
    time_alone()


def test_together(time_together):
    time_together()


if __name__ == "__main__":
    main(specs, build)

# SPDX-License-Identifier: Apache-2.0
"""dropout_add beside torch's dropout and addition, the end of every T5 sublayer; forward + backward."""

from _elementwise import Elementwise
from _harness import main
from torch import Tensor, nn

from fastprompt.ops import dropout_add


def fused(p: float, x: Tensor, residual: Tensor) -> Tensor:
    return dropout_add(x, residual, dropout_p=p)


def in_hf(p: float, x: Tensor, residual: Tensor) -> Tensor:
    return residual + nn.functional.dropout(x, p)


OP = Elementwise(
    "dropout_add",
    "forward + backward",
    fused,
    "torch dropout, add",
    in_hf,
    leaves=2,
    tensors=5,  # x, residual, h; dh, dx
    goal={"B": 8, "L": 356, "D": 768},
    others=({"B": 1, "L": 356, "D": 768}, {"B": 8, "L": 356, "D": 512}),
)
specs, contenders, build = OP.specs, OP.contenders, OP.build


def test_alone(time_alone):
    time_alone()


def test_together(time_together):
    time_together()


if __name__ == "__main__":
    main(specs, build)

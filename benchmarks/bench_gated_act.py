# SPDX-License-Identifier: Apache-2.0
"""gated_act beside HF's gate: gelu_new, product, dropout; forward + backward, as T5 v1.1 has them."""

from _elementwise import Elementwise
from _harness import main
from torch import Tensor, nn
from transformers.activations import ACT2FN

from fastprompt.ops import gated_act


def fused(p: float, a: Tensor, b: Tensor) -> Tensor:
    return gated_act(a, b, "gelu_new", dropout_p=p)


def in_hf(p: float, a: Tensor, b: Tensor) -> Tensor:
    return nn.functional.dropout(ACT2FN["gelu_new"](a) * b, p)


def terms(a: Tensor, b: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    """1 + tanh(u) cancels in the tail, and so do the two terms of its gradient."""
    return (a * b).abs(), (dy * b).abs(), (dy * a).abs()


OP = Elementwise(
    "gated_act",
    "gate, forward + backward",
    fused,
    "HF gelu_new, *, dropout",
    in_hf,
    leaves=2,
    tensors=8,  # a, b, y; dy, a, b, da, db
    goal={"B": 8, "L": 356, "F": 2048},
    others=({"B": 1, "L": 356, "F": 1024}, {"B": 8, "L": 356, "F": 1024}),
    terms=terms,
)
specs, contenders, build = OP.specs, OP.contenders, OP.build


def test_alone(time_alone):
    time_alone()


def test_together(time_together):
    time_together()


if __name__ == "__main__":
    main(specs, build)

# SPDX-License-Identifier: Apache-2.0
"""dropout_add beside torch's dropout and addition, the end of every T5 sublayer; forward + backward."""

from functools import partial

import torch
from _harness import OURS, Case, Contender, Options, Spec, check_results, main, ours, step
from torch import Tensor, nn

from fastprompt.ops import dropout_add
from fastprompt.testing import saved_bytes

HF, STEP = "torch dropout, add", "forward + backward"
GOAL = {"B": 8, "L": 356, "D": 768}
OTHERS = [{"B": 1, "L": 356, "D": 768}, {"B": 8, "L": 356, "D": 512}]
TINY = {"B": 1, "L": 2, "D": 16}  # nothing to move: what a call costs
QUICK = {"B": 2, "L": 5, "D": 64}


def specs(options: Options) -> list[Spec]:
    goal, others = (QUICK, [TINY]) if options.quick else (GOAL, [*OTHERS, TINY])
    headline = [(dtype, p) for dtype in (torch.float32, torch.bfloat16) for p in (0.0, 0.1)]
    found = [Spec(STEP, dtype, tuple(goal.items()), True, p) for dtype, p in headline]
    return found + [Spec(STEP, torch.float32, tuple(sizes.items())) for sizes in others]


def fused(p: float, x: Tensor, residual: Tensor) -> Tensor:
    return dropout_add(x, residual, dropout_p=p)


def in_hf(p: float, x: Tensor, residual: Tensor) -> Tensor:
    return residual + nn.functional.dropout(x, p)


def contenders(spec: Spec, options: Options) -> list[str]:
    return [OURS, HF]


def build(spec: Spec, options: Options) -> Case:
    shape, p = tuple(size for _, size in spec.sizes), spec.dropout_p
    make = partial(torch.randn, *shape, dtype=spec.dtype, device=options.device)
    leaves, grad = (make(requires_grad=True), make(requires_grad=True)), make()
    calls: dict[str, Contender] = {}
    for name, function in {OURS: fused, HF: in_hf}.items():
        with saved_bytes() as saved:
            kept = function(p, *leaves)
        del kept
        call = step(partial(function, p, *leaves), leaves, grad)
        calls |= ours("dropout_add", call, options.device, saved.bytes) if name == OURS else {
            name: Contender(call, None, saved.bytes)
        }  # fmt: skip
    checked = calls
    if p > 0.0:  # masks are random: what can be compared is the call without
        checked = {
            name: Contender(step(partial(function, 0.0, *leaves), leaves, grad))
            for name, function in {OURS: fused, HF: in_hf}.items()
        }
    bytes_moved = 5 * grad.nbytes  # x, residual, h; dh, dx
    return Case("dropout_add", spec, calls, bytes_moved, partial(check, checked, leaves, grad), {})


def check(calls: dict[str, Contender], leaves: tuple[Tensor, ...], grad: Tensor) -> None:
    wide = tuple(leaf.detach().double().requires_grad_() for leaf in leaves)
    out = in_hf(0.0, *wide)
    truth = (out, *torch.autograd.grad(out, wide, grad.double()))
    check_results("dropout_add", calls, HF, tuple(t.detach() for t in truth))


def test_alone(time_alone):
    time_alone()


def test_together(time_together):
    time_together()


if __name__ == "__main__":
    main(specs, build)

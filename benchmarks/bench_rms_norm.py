# SPDX-License-Identifier: Apache-2.0
"""rms_norm beside HF's T5LayerNorm, torch.compile of it, and torch's own rms_norm; forward + backward, frozen weight.

The goal shape is N = 8 x 356 rows (B=8, P=100, S=256), D=768 in fp32. Counted bytes: forward reads and writes N D
elements; backward reads 2 N D and writes N D. HF's eager norm makes six passes forward alone.
"""

import pytest
import torch
from _harness import gate, measure, record, report
from torch.nn import functional
from transformers.models.t5.modeling_t5 import T5LayerNorm

from fastprompt.ops import rms_norm

GOAL = {"B": 8, "L": 356, "D": 768}
SHAPES = [GOAL, {"B": 1, "L": 164, "D": 512}, {"B": 8, "L": 612, "D": 1024}]
QUICK = [{"B": 2, "L": 5, "D": 32}]
DROPOUT = 0.1


class Case:
    """The inputs of one shape and the contenders: x [B, L, D] -> y, or (y, h) for the residual form."""

    def __init__(self, shape, dtype, device, compiled):
        self.x, self.residual = (torch.randn(*shape.values(), device=device).to(dtype) for _ in range(2))
        self.x.requires_grad_()
        self.residual.requires_grad_()
        self.norm = T5LayerNorm(shape["D"]).to(device, dtype).requires_grad_(False)
        self.compiled = torch.compile(self.norm) if compiled else None

    def plain(self):
        weight, eps = self.norm.weight, self.norm.variance_epsilon
        calls = {
            "fastprompt": lambda: rms_norm(self.x, weight, eps),
            "HF eager": lambda: self.norm(self.x),
            "torch rms_norm": lambda: functional.rms_norm(self.x, weight.shape, weight, eps),
        }
        return calls if self.compiled is None else {**calls, "HF compiled": lambda: self.compiled(self.x)}

    def fused(self):
        def ours():
            return rms_norm(
                self.x,
                self.norm.weight,
                self.norm.variance_epsilon,
                residual=self.residual,
                dropout_p=DROPOUT,
            )

        def hf():
            h = self.residual + functional.dropout(self.x, DROPOUT)
            return self.norm(h), h

        return {"fastprompt": ours, "HF eager": hf}


def step(forward, inputs):
    """One forward + backward, as a function of nothing."""
    first = forward()
    gradients = [torch.randn_like(y) for y in (first if isinstance(first, tuple) else (first,))]

    def run():
        y = forward()
        torch.autograd.grad(y if isinstance(y, tuple) else (y,), inputs, gradients)

    return run


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def dtype(request):
    return request.param


@pytest.fixture(params=range(len(SHAPES)))
def shape(request, quick):
    shapes = QUICK if quick else SHAPES
    if request.param >= len(shapes):
        pytest.skip("one small shape is enough for --quick")
    return shapes[request.param]


def test_rms_norm(shape, dtype, device, rounds, results, goal, quick):
    case = Case(shape, dtype, device, compiled=not quick)
    calls = case.plain()
    wide = case.x.detach().double()
    truth = case.norm.weight.double() * wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    gate("rms_norm", calls["fastprompt"](), calls["HF eager"](), truth)
    times = measure({name: step(call, [case.x]) for name, call in calls.items()}, device, rounds)
    report(f"rms_norm forward + backward {shape} {dtype}", times)
    record(results, "rms_norm", {**shape, "dtype": str(dtype)}, times)
    if shape == GOAL and dtype == torch.float32:
        goal("against HF eager", times["HF eager"]["median"] / times["fastprompt"]["median"], 3.0)


def test_rms_norm_residual(shape, dtype, device, rounds, results):
    case = Case(shape, dtype, device, compiled=False)
    calls = {name: step(call, [case.x, case.residual]) for name, call in case.fused().items()}
    times = measure(calls, device, rounds)
    report(f"residual + dropout {DROPOUT} + rms_norm, forward + backward {shape} {dtype}", times)
    record(results, "rms_norm_residual", {**shape, "dtype": str(dtype)}, times)


@pytest.mark.parametrize("contender", ["fastprompt", "HF eager", "torch rms_norm"])
def test_step(benchmark, contender, device, quick):
    benchmark.group = "rms_norm forward + backward"
    case = Case(QUICK[0] if quick else GOAL, torch.float32, device, compiled=False)
    benchmark(step(case.plain()[contender], [case.x]))

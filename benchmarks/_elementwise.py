# SPDX-License-Identifier: Apache-2.0
"""Elementwise ops with dropout beside the lines that they take the place of; forward + backward."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from _harness import OURS, Case, Contender, Options, Spec, check_results, ours, step
from torch import Tensor

from fastprompt.testing import saved_bytes

Sizes = dict[str, int]


@dataclass(frozen=True)
class Elementwise:
    """An op and its stock, both (dropout_p, *leaves) -> output, all of one shape.

    Args:
        op: the op's name.
        what: the name of its tables.
        fused: the op.
        stock_name, stock: what stands beside it.
        leaves: how many inputs it has.
        tensors: how many tensors a step reads and writes at least.
        goal, others: the shape of the headline, and further ones; the last size is the width.
        terms: (*leaves, grad) -> of the output and of each gradient, the size of the terms that cancel in it; None:
            none do.
    """

    op: str
    what: str
    fused: Callable[..., Tensor]
    stock_name: str
    stock: Callable[..., Tensor]
    leaves: int
    tensors: int
    goal: Sizes
    others: tuple[Sizes, ...]
    terms: Callable[..., tuple[Tensor, ...]] | None = None

    def specs(self, options: Options) -> list[Spec]:
        *_, width = self.goal
        tiny = {"B": 1, "L": 2, width: 16}  # nothing to move: what a call costs
        quick = {"B": 2, "L": 5, width: 64}
        goal, others = (quick, [tiny]) if options.quick else (self.goal, [*self.others, tiny])
        headline = [(dtype, p) for dtype in (torch.float32, torch.bfloat16) for p in (0.0, 0.1)]
        found = [Spec(self.what, dtype, tuple(goal.items()), True, p) for dtype, p in headline]
        return found + [Spec(self.what, torch.float32, tuple(sizes.items())) for sizes in others]

    def contenders(self, spec: Spec, options: Options) -> list[str]:
        return [OURS, self.stock_name]

    def build(self, spec: Spec, options: Options) -> Case:
        shape = tuple(size for _, size in spec.sizes)
        make = partial(torch.randn, *shape, dtype=spec.dtype, device=options.device)
        leaves, grad = tuple(make(requires_grad=True) for _ in range(self.leaves)), make() / 8
        functions = {OURS: self.fused, self.stock_name: self.stock}
        calls: dict[str, Contender] = {}
        for name, function in functions.items():
            with saved_bytes() as saved:
                kept = function(spec.dropout_p, *leaves)
            del kept
            call = step(partial(function, spec.dropout_p, *leaves), leaves, grad)
            if name == OURS:
                calls |= ours(self.op, call, options.device, saved.bytes)
            else:
                calls[name] = Contender(call, None, saved.bytes)
        checked = calls
        if spec.dropout_p > 0.0:  # masks are random: what can be compared is the call without
            checked = {
                name: Contender(step(partial(function, 0.0, *leaves), leaves, grad))
                for name, function in functions.items()
            }
        check = partial(self.check, checked, leaves, grad)
        return Case(self.op, spec, calls, self.tensors * grad.nbytes, check)

    def check(self, calls: dict[str, Contender], leaves: tuple[Tensor, ...], grad: Tensor) -> None:
        wide = tuple(leaf.detach().double().requires_grad_() for leaf in leaves)
        out = self.stock(0.0, *wide)
        truth = tuple(t.detach() for t in (out, *torch.autograd.grad(out, wide, grad.double())))
        terms = self.terms(*(leaf.detach() for leaf in wide), grad.double()) if self.terms else None
        check_results(self.op, calls, self.stock_name, truth, terms)

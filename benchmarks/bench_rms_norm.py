# SPDX-License-Identifier: Apache-2.0
"""rms_norm beside HF's T5LayerNorm, torch.compile of it and PyTorch's own rms_norm; frozen weight, forward + backward.

The residual form, h = residual + dropout(x) and y = norm(h), stands beside the same lines of HF's T5 layers.
"""

from functools import partial

import torch
from _harness import OURS, Case, Contender, Options, Spec, check_results, main, ours, step
from torch import Tensor, nn
from transformers.models.t5.modeling_t5 import T5LayerNorm

from fastprompt.ops import rms_norm
from fastprompt.testing import saved_bytes

HF, COMPILED, TORCH = "HF T5LayerNorm", "torch.compile of that", "F.rms_norm"
NORM, RESIDUAL = "norm, forward + backward", "residual + norm, forward + backward"
GOAL = {"B": 8, "L": 356, "D": 768}
OTHERS = [{"B": 1, "L": 356, "D": 768}, {"B": 32, "L": 612, "D": 768}, {"B": 8, "L": 356, "D": 512}]
TINY = {"B": 1, "L": 2, "D": 16}  # nothing to move: what a call costs
QUICK = {"B": 2, "L": 5, "D": 64}
EPS = 1e-6


def specs(options: Options) -> list[Spec]:
    goal, others = (QUICK, [TINY]) if options.quick else (GOAL, [*OTHERS, TINY])
    fp32, bf16 = torch.float32, torch.bfloat16
    headline = [
        (NORM, fp32, 0.0),
        (NORM, bf16, 0.0),
        (RESIDUAL, fp32, 0.0),
        (RESIDUAL, fp32, 0.1),
        (RESIDUAL, bf16, 0.1),
    ]
    found = [Spec(what, dtype, tuple(goal.items()), True, p) for what, dtype, p in headline]
    return found + [Spec(what, fp32, tuple(sizes.items())) for sizes in others for what in (NORM, RESIDUAL)]


def contenders(spec: Spec, options: Options) -> list[str]:
    compiled = [COMPILED] if not options.quick and (spec.headline or options.all_shapes) else []
    return [OURS, HF, *compiled, *([TORCH] if spec.what == NORM else [])]


def build(spec: Spec, options: Options) -> Case:
    shape, item = tuple(size for _, size in spec.sizes), spec.dtype.itemsize
    make = partial(torch.randn, dtype=spec.dtype, device=options.device)
    x, residual = make(*shape, requires_grad=True), make(*shape, requires_grad=True)
    norm = T5LayerNorm(shape[-1], EPS).to(options.device, spec.dtype).requires_grad_(False)
    norm.weight.copy_(make(shape[-1]))
    leaves = (x,) if spec.what == NORM else (x, residual)
    grads = tuple(make(*shape) for _ in leaves)

    def fused(p: float) -> tuple[Tensor, Tensor]:
        return rms_norm(x, norm.weight, EPS, residual=residual, dropout_p=p)

    def in_hf(p: float) -> tuple[Tensor, Tensor]:
        h = residual + nn.functional.dropout(x, p)
        return norm(h), h

    if spec.what == NORM:
        forwards = {OURS: lambda p: rms_norm(x, norm.weight, EPS), HF: lambda p: norm(x)}
        forwards[TORCH] = lambda p: nn.functional.rms_norm(x, norm.weight.shape, norm.weight, EPS)
    else:
        forwards = {OURS: fused, HF: in_hf}
    if COMPILED in contenders(spec, options):
        torch._dynamo.reset()
        forwards[COMPILED] = torch.compile(forwards[HF], dynamic=False)

    calls: dict[str, Contender] = {}
    for name in contenders(spec, options):
        forward = partial(forwards[name], spec.dropout_p)
        with saved_bytes(exclude=(norm.weight,)) as saved:
            kept = forward()
        del kept
        call = step(forward, leaves, grads)
        calls |= ours("rms_norm", call, options.device, saved.bytes) if name == OURS else {
            name: Contender(call, None, saved.bytes)
        }  # fmt: skip
    checked = calls
    if spec.dropout_p > 0.0:  # masks are random: what can be compared is the call without
        checked = {name: Contender(step(partial(forwards[name], 0.0), leaves, grads)) for name in (OURS, HF)}

    tensors = 5 if spec.what == NORM else 8 + (spec.dropout_p > 0)  # [B, L, D] tensors read or written
    goals = (
        {HF: 3.0}
        if (spec.what, spec.dtype) == (NORM, torch.float32) and spec.headline and not options.quick
        else {}
    )
    check = partial(check_norm, checked, leaves, norm.weight, grads)
    return Case("rms_norm", spec, calls, tensors * x.numel() * item, check, goals)


def check_norm(
    calls: dict[str, Contender], leaves: tuple[Tensor, ...], w: Tensor, grads: tuple[Tensor, ...]
) -> None:
    wide = tuple(leaf.detach().double().requires_grad_() for leaf in leaves)
    h = sum(wide)
    rstd = torch.rsqrt(h.square().mean(-1, keepdim=True) + EPS)
    y = w.double() * (h * rstd)
    out = (y, h)[: len(leaves)]
    truth = (*out, *torch.autograd.grad(out, wide, tuple(grad.double() for grad in grads)))
    truth = tuple(t.detach() for t in truth)
    # In short rows the two terms of the gradient cancel almost wholly.
    cancelling = (rstd.detach() * grads[0].double() * w.double()).abs()
    sizes = (*(t.abs() for t in truth[: len(out)]), *[cancelling] * len(leaves))
    check_results("rms_norm", calls, HF, truth, tuple(t.amax(-1, keepdim=True) for t in sizes))


def test_alone(time_alone):
    time_alone()


def test_together(time_together):
    time_together()


if __name__ == "__main__":
    main(specs, build)

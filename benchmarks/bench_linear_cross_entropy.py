# SPDX-License-Identifier: Apache-2.0
"""linear_cross_entropy beside HF's lines, the language model head and CrossEntropyLoss, and torch.compile of them.

Frozen head; forward + backward, and forward alone. N is the number of target tokens in a batch.
"""

from functools import partial

import torch
from _harness import OURS, Call, Case, Contender, Options, Spec, check_results, main, ours, step
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from fastprompt.ops import linear_cross_entropy
from fastprompt.testing import saved_bytes

HF, COMPILED = "HF lm_head + CrossEntropyLoss", "torch.compile of that"
BOTH, FORWARD = "loss, forward + backward", "loss, forward"
T5, MT5 = 32128, 250112  # words of the vocabularies
GOAL = {"N": 256, "V": T5, "D": 512}
OTHERS = [
    {"N": 32, "V": T5, "D": 512},
    {"N": 128, "V": T5, "D": 768},
    {"N": 4096, "V": T5, "D": 768},
    {"N": 256, "V": MT5, "D": 512},
]
QUICK, TINY = {"N": 6, "V": 300, "D": 64}, {"N": 2, "V": 64, "D": 16}
IGNORED = 0.25  # of the labels: padding


def specs(options: Options) -> list[Spec]:
    goal, others = (QUICK, [TINY]) if options.quick else (GOAL, [*OTHERS, TINY])
    fp32, bf16 = torch.float32, torch.bfloat16
    headline = [(BOTH, fp32), (BOTH, bf16), (FORWARD, fp32)]
    found = [Spec(what, dtype, tuple(goal.items()), True) for what, dtype in headline]
    return found + [Spec(BOTH, dtype, tuple(sizes.items())) for sizes in others for dtype in (fp32, bf16)]


def contenders(spec: Spec, options: Options) -> list[str]:
    compiled = [COMPILED] if not options.quick and (spec.headline or options.all_shapes) else []
    return [OURS, HF, *compiled]


def build(spec: Spec, options: Options) -> Case:
    N, V, D = (size for _, size in spec.sizes)
    make = partial(torch.randn, dtype=spec.dtype, device=options.device)
    hidden, weight = make(N, D, requires_grad=spec.what == BOTH), make(V, D) / D**0.5
    labels = torch.randint(V, (N,), device=options.device)
    labels[torch.arange(N, device=options.device) % round(1 / IGNORED) == 1] = -100

    def in_hf() -> Tensor:
        return cross_entropy(linear(hidden, weight), labels)

    forwards: dict[str, Call] = {OURS: lambda: linear_cross_entropy(hidden, weight, labels), HF: in_hf}
    if COMPILED in contenders(spec, options):
        torch._dynamo.reset()
        forwards[COMPILED] = torch.compile(in_hf, dynamic=False)

    calls: dict[str, Contender] = {}
    for name in contenders(spec, options):
        with saved_bytes(exclude=(weight,)) as saved:
            kept = forwards[name]()
        del kept
        call = step(forwards[name], hidden) if spec.what == BOTH else forwards[name]
        calls |= ours("linear_cross_entropy", call, options.device, saved.bytes) if name == OURS else {
            name: Contender(call, None, saved.bytes)
        }  # fmt: skip

    least = weight.nbytes + (2 if spec.what == BOTH else 1) * hidden.nbytes
    goals = {HF: 1.0} if (spec.what, spec.dtype) == (BOTH, torch.float32) and not options.quick else {}
    return Case(
        "linear_cross_entropy", spec, calls, least, partial(check, calls, hidden, weight, labels), goals
    )


def check(calls: dict[str, Contender], hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    """Against float64."""
    wide = hidden.detach().double().requires_grad_(hidden.requires_grad)
    loss = cross_entropy(linear(wide, weight.double()), labels)
    truth = (loss, *torch.autograd.grad(loss, wide)) if hidden.requires_grad else (loss,)
    check_results("linear_cross_entropy", calls, HF, tuple(t.detach() for t in truth))


def test_alone(time_alone):
    time_alone()


def test_together(time_together):
    time_together()


if __name__ == "__main__":
    main(specs, build)

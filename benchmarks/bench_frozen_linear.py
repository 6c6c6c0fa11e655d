# SPDX-License-Identifier: Apache-2.0
"""frozen_linear beside PyTorch's products: a layer's, forward and backward to the input; a token's, forward."""

from functools import partial

import torch
from _harness import OURS, Case, Contender, Options, Spec, check_results, main, ours, step
from torch import nn

from fastprompt.ops import frozen_linear

HF, STEP, FORWARD = "torch linear", "forward + backward", "forward"
GOAL = {"M": 1824, "N": 512, "K": 512}  # B = 8, L = 228 of v1.1-small
OTHERS = [
    {"M": 1824, "N": 1024, "K": 512},
    {"M": 912, "N": 768, "K": 768},
    {"M": 2048, "N": 2048, "K": 768},
    {"M": 2048, "N": 768, "K": 2048},
    {"M": 64, "N": 512, "K": 512},
    {"M": 8, "N": 2048, "K": 768},
]
FEW_ROWS = [  # sequences that generate: the head of v1.1-small, and a layer of v1.1-base
    *({"M": M, "N": 32128, "K": 512} for M in (1, 2, 4, 8, 16)),
    {"M": 4, "N": 2048, "K": 768},
]
HALF_ROWS = [{"M": M, "N": 32128, "K": 512} for M in (1, 4, 8, 16, 32)]  # in bf16, on a CPU
HALF = {"M": 64, "N": 1024, "K": 512}  # in bf16 and fp16, on a CPU
QUICK = {"M": 40, "N": 48, "K": 64}


def specs(options: Options) -> list[Spec]:
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    shapes = [QUICK] if options.quick else [GOAL, *OTHERS]
    few = [{"M": 2, "N": 48, "K": 512}] if options.quick else FEW_ROWS
    half_rows = [] if options.device == "cuda" else few if options.quick else HALF_ROWS
    steps = [Spec(STEP, dtype, tuple(sizes.items()), number == 0) for number, sizes in enumerate(shapes)]
    halves = [] if options.device == "cuda" else [torch.bfloat16, torch.float16]
    sizes = tuple((QUICK if options.quick else HALF).items())
    return [
        *steps,
        *(Spec(FORWARD, dtype, tuple(each.items())) for each in few),
        *(Spec(FORWARD, torch.bfloat16, tuple(each.items())) for each in half_rows),
        *(Spec(STEP, half, sizes) for half in halves),
    ]


def contenders(spec: Spec, options: Options) -> list[str]:
    return [OURS, HF]


def build(spec: Spec, options: Options) -> Case:
    M, N, K = (size for _, size in spec.sizes)
    make = partial(torch.randn, dtype=spec.dtype, device=options.device)
    x, weight, grad = make(M, K, requires_grad=True), make(N, K), make(M, N)
    functions = {OURS: frozen_linear, HF: nn.functional.linear}
    wide = weight.double()
    products = [(x.detach().double(), wide.t())]
    if spec.what == FORWARD:
        timed = {name: partial(function, x.detach(), weight) for name, function in functions.items()}
    else:
        timed = {name: step(partial(function, x, weight), x, grad) for name, function in functions.items()}
        products.append((grad.double(), wide))
    truth = tuple(a @ b for a, b in products)
    terms = tuple(a.abs() @ b.abs() for a, b in products)
    calls = ours("frozen_linear", timed[OURS], options.device, 0) | {HF: Contender(timed[HF], None, 0)}
    check = partial(check_results, "frozen_linear", calls, HF, truth, terms)
    bytes_moved = len(truth) * (x.nbytes + weight.nbytes + grad.nbytes)
    return Case("frozen_linear", spec, calls, bytes_moved, check, {})


def test_alone(time_alone):
    time_alone()


def test_together(time_together):
    time_together()


if __name__ == "__main__":
    main(specs, build)

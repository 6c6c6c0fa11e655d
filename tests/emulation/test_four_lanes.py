# SPDX-License-Identifier: Apache-2.0
"""The kernels in vectors of four floats, as for ARM's NEON, compiled for this CPU: what is left out is NEON's own
instructions, for which portable code stands in.
"""

import pytest
import test_frozen_linear
import torch
from attention_case import Case
from samples import SAMPLES

from fastprompt import backend_used, use_backend
from fastprompt.dispatch import OPS
from fastprompt.ops import frozen_linear, gated_act, prompt_embed, relu_dropout, rms_norm

BACKEND = "four_lanes"


@pytest.fixture(autouse=True)
def _lanes(build, offer):
    kernels = build.four_lane_kernels()
    for op in OPS:
        offer(op, BACKEND, kernels)


def with_gradient(function, x, *arguments, **options):
    leaf = x.clone().requires_grad_()
    y = function(leaf, *arguments, **options)
    dy = torch.arange(float(y.numel())).sin().view_as(y).to(y.dtype)
    return y.detach(), *torch.autograd.grad(y, leaf, dy)


@pytest.mark.parametrize("name", sorted(set(SAMPLES) - {"t5_attention"}))
def test_samples(name):
    with torch.no_grad():
        for member, arguments in SAMPLES[name]():
            results = []
            for backend in (BACKEND, "cpu:scalar"):
                with use_backend(name, backend):
                    result = getattr(torch.ops.fastprompt, member)(*arguments)
                results.append((result,) if isinstance(result, torch.Tensor) else result)
            for ours, scalar in zip(*results, strict=True):
                torch.testing.assert_close(ours, scalar, equal_nan=True)


SEED = torch.tensor([7])
EMBEDDING = torch.nn.Parameter(torch.ones(9, 1001), requires_grad=False)
ROWS = {
    "rms_norm": lambda x: with_gradient(rms_norm, x, torch.linspace(0.5, 2.0, x.shape[-1])),
    "gated_act": lambda x: with_gradient(gated_act, x, x.flip(0), dropout_p=0.3, seed=SEED),
    "relu_dropout": lambda x: with_gradient(relu_dropout, x, dropout_p=0.3, seed=SEED),
    "prompt_embed": lambda x: with_gradient(
        lambda prompts: prompt_embed(
            torch.tensor([[1, 2]]), EMBEDDING.to(x.dtype), prompts, dropout_p=0.3, seed=SEED
        )[0],
        x,
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", sorted(ROWS))
def test_rows_have_the_bits_of_single_floats(name, dtype):
    x = torch.randn(5, 1001).to(dtype)
    results = []
    for backend in (BACKEND, "cpu:scalar"):
        with use_backend(name, backend):
            results.append(ROWS[name](x))
            assert backend_used(name) == backend
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("T", [1, 3, 80])
def test_attention(T, dtype):
    with use_backend("t5_attention", BACKEND):
        Case("cpu", dtype, T=T, S=86, K=32, P=3, dropout_p=0.1).check()


@pytest.mark.parametrize("shape", [(17, 51, 49), (103, 70, 129), (305, 130, 300), (3, 70, 600)], ids=str)
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_products(shape, layout):
    with use_backend("frozen_linear", BACKEND):
        if shape[0] < 6:
            x, weight, _ = test_frozen_linear.draw(*shape)
            assert_close = torch.testing.assert_close
            assert_close(
                frozen_linear(x, weight), (x.double() @ weight.double().t()).float(), rtol=1e-5, atol=1e-4
            )
        else:
            test_frozen_linear.check(*shape, layout)

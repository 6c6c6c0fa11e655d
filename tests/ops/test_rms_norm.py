# SPDX-License-Identifier: Apache-2.0
"""rms_norm against HF's T5LayerNorm: values, gradients, dtypes, layouts and what it saves."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.t5.modeling_t5 import T5LayerNorm

from fastprompt import backends, use_backend
from fastprompt._native import CPU_TARGETS
from fastprompt.ops import rms_norm
from fastprompt.testing import assert_within_budget, random_rows, saved_bytes

OP = "rms_norm"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MIXES = [(x, w) for x in FLOATS for w in FLOATS]
SHAPES = [
    (1, 1),
    (3, 3),
    (7, 7),
    (5, 33),
    (2, 3, 500),
    (9, 768),
    pytest.param((19, 1472), marks=pytest.mark.big),
]


def weight(D, dtype, device):
    return (1 + 0.5 * torch.randn(D, generator=torch.Generator().manual_seed(1))).to(device, dtype)


def hf(x, w, eps=1e-6):
    norm = T5LayerNorm(len(w), eps)
    norm.weight = torch.nn.Parameter(w, requires_grad=False)
    return norm(x)


def exact(x, w, eps=1e-6):
    x, w = x.double(), w.double()
    return w * x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def value_and_gradient(function, x, w, dy):
    x = x.detach().requires_grad_()
    y = function(x, w)
    (dx,) = torch.autograd.grad(y, x, dy.to(y.dtype))
    return y.detach(), dx


def gradient_terms(x, w, dy, eps=1e-6):
    """The size of the terms whose difference is dx: in short rows they cancel almost wholly."""
    rstd = (x.double().pow(2).mean(-1, keepdim=True) + eps).rsqrt()
    return (rstd * dy.double() * w.double()).abs().amax(-1, keepdim=True)


def check(x, w, dy):
    (y, dx), (hf_y, hf_dx) = value_and_gradient(rms_norm, x, w, dy), value_and_gradient(hf, x, w, dy)
    true_y, true_dx = value_and_gradient(exact, x.double(), w, dy)
    assert_within_budget(y, hf_y, true_y, magnitude="element", ulps=3)
    assert_within_budget(dx, hf_dx, true_dx, magnitude=gradient_terms(x, w, dy))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("x_dtype", "w_dtype"), MIXES, ids=str)
def test_value_and_gradient(backend, device, shape, x_dtype, w_dtype):
    x, w = random_rows(shape, x_dtype, device), weight(shape[-1], w_dtype, device)
    check(x, w, random_rows(shape, w_dtype, device, seed=2))


def test_any_shape_and_layout(backend, device, examples):
    @settings(max_examples=examples)
    @given(st.integers(1, 9), st.integers(1, 130), st.sampled_from(MIXES), st.booleans(), st.integers(0, 999))
    def any_case(N, D, dtypes, transposed, seed):
        x = random_rows((N, D), dtypes[0], device, seed)
        x = x.t().contiguous().t() if transposed else x
        check(x, weight(D, dtypes[1], device), random_rows((N, D), dtypes[1], device, seed + 1))

    any_case()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_layout_of_the_input_changes_no_bit(backend, device, dtype):
    w, base = weight(33, dtype, device), random_rows((4, 6, 33), dtype, device)
    layouts = {
        "transposed": base.transpose(0, 1).contiguous().transpose(0, 1),
        "strided": base.repeat_interleave(2, dim=-1)[..., ::2],
        "shifted": torch.cat((base.reshape(-1)[:1], base.reshape(-1)))[1:].view(base.shape),
    }
    expected, expected_dx = value_and_gradient(rms_norm, base, w, base)
    for name, x in layouts.items():
        y, dx = value_and_gradient(rms_norm, x, w, x)
        assert torch.equal(y, expected), name
        assert torch.equal(dx, expected_dx), name
    expanded = base[:1].expand(4, 6, 33)
    assert torch.equal(rms_norm(expanded, w), rms_norm(expanded.contiguous(), w))


def test_expanded_gradient(backend, device):
    """sum() hands back a gradient with stride 0."""
    w = weight(7, torch.float32, device)
    x = random_rows((5, 7), torch.float32, device).requires_grad_()
    rms_norm(x, w).sum().backward()
    _, expected = value_and_gradient(rms_norm, x, w, torch.ones(5, 7, device=device))
    assert torch.equal(x.grad, expected)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0, 7), (7,), (1, 1, 1, 2)], ids=str)
def test_empty_and_unusual_ranks(backend, device, shape):
    x, w = torch.randn(shape, device=device, requires_grad=True), torch.ones(shape[-1], device=device)
    y = rms_norm(x, w)
    y.sum().backward()
    torch.testing.assert_close(y, hf(x, w))
    assert x.grad.shape == x.shape


def test_infinities_nans_and_zero_rows_as_in_hf(backend, device):
    x = random_rows((6, 9), torch.float32, device)
    x[0] = 0.0
    x[1, 2], x[2, 3], x[3, 4] = float("inf"), float("-inf"), float("nan")
    x[4] = 3e38  # its squares overflow
    x[5] = 1e-30  # its squares vanish beside eps
    w = weight(9, torch.float32, device)
    for eps in (1e-6, 0.0):
        torch.testing.assert_close(rms_norm(x, w, eps), hf(x, w, eps), equal_nan=True, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_large_elements_do_not_overflow(backend, device, dtype):
    largest = 6e4 if dtype == torch.float16 else 1e18
    x = torch.full((2, 40), largest, device=device, dtype=dtype)
    torch.testing.assert_close(rms_norm(x, torch.ones(40, device=device, dtype=dtype)), torch.ones_like(x))


def test_same_bits_again_and_on_any_number_of_threads(backend, device):
    x, w = random_rows((64, 768), torch.bfloat16, device), weight(768, torch.bfloat16, device)
    first = value_and_gradient(rms_norm, x, w, x)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        again = value_and_gradient(rms_norm, x, w, x)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.big
@pytest.mark.parametrize("D", [1024, 1000])
@pytest.mark.parametrize(("x_dtype", "w_dtype"), [MIXES[0], MIXES[1], MIXES[4]], ids=str)
def test_a_row_is_the_same_alone_and_among_many(backend, device, x_dtype, w_dtype, D):
    """Results larger than its caches a CPU writes past them where rows are whole lines of 64 bytes, as 1024 numbers are
    and 1000 not."""
    size = min(x_dtype.itemsize, w_dtype.itemsize)
    x, dy = (random_rows((11, D), dtype, device, seed=dtype.itemsize) for dtype in (x_dtype, w_dtype))
    residual, w = random_rows((11, D), w_dtype, device, seed=5), weight(D, w_dtype, device)
    times = 2**24 // (11 * D * size) + 1

    def run(x, residual, dy):
        y, dx = value_and_gradient(rms_norm, x, w, dy)
        leaves = [x.clone().requires_grad_(), residual.clone().requires_grad_()]
        fused, h = rms_norm(leaves[0], w, residual=leaves[1])
        torch.autograd.backward((fused, h), (dy, torch.ones_like(h)))
        return y, dx, fused.detach(), h.detach(), *(leaf.grad for leaf in leaves)

    few, many = run(x, residual, dy), run(*(t.repeat(times, 1) for t in (x, residual, dy)))
    for one, all_of_them in zip(few, many, strict=True):
        one = one if device.type == "cpu" else all_of_them[:11]  # a GPU's order of addition may depend on N
        assert torch.equal(all_of_them, one.repeat(times, 1))


@pytest.mark.skipif(len(CPU_TARGETS) < 2, reason="needs two instruction sets")
def test_same_bits_with_every_instruction_set():
    x, residual = (random_rows((5, 1001), torch.float32, torch.device("cpu"), seed) for seed in (0, 1))
    w, results = weight(1001, torch.float32, torch.device("cpu")), []
    for backend in backends(OP)[1 : backends(OP).index("reference")]:
        with use_backend(OP, backend):
            leaf = x.clone().requires_grad_()
            y, h = rms_norm(leaf, w, residual=residual)
            torch.autograd.backward((y, h), (x, residual))
            results.append((*value_and_gradient(rms_norm, x, w, x), y, h, leaf.grad))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_saves_the_input_and_one_float_per_row(backend, device):
    w = torch.nn.Parameter(weight(64, torch.bfloat16, device), requires_grad=False)
    x = random_rows((10, 64), torch.bfloat16, device)
    with saved_bytes() as saved:
        rms_norm(x, w)
    assert saved.bytes == 0
    x.requires_grad_()
    with saved_bytes() as saved, torch.no_grad():
        rms_norm(x, w)
    assert saved.bytes == 0
    with saved_bytes() as saved:
        y = rms_norm(x, w)
    assert saved.bytes == 10 * 64 * 2 + 10 * 4
    y.sum().backward()
    assert w.grad is None


def test_derivative_of_the_reference():
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    w = torch.randn(5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: rms_norm(x, w), x)

# SPDX-License-Identifier: Apache-2.0
"""rms_norm of residual + dropout(x): against the HF composition, and bit for bit against its own parts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.t5.modeling_t5 import T5LayerNorm

from fastprompt.ops import rms_norm
from fastprompt.ops._dropout import keep_mask, keep_scale
from fastprompt.testing import assert_within_budget, random_rows, saved_bytes

OP = "rms_norm"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MIXES = [(x, residual, w) for x in FLOATS for residual in FLOATS for w in FLOATS]


def weight(D, dtype, device):
    return (1 + 0.5 * torch.randn(D, generator=torch.Generator().manual_seed(1))).to(device, dtype)


def seed_of(number, device):
    return torch.tensor([number], dtype=torch.int64, device=device)


def ours(x, residual, w, p, seed):
    return rms_norm(x, w, residual=residual, dropout_p=p, seed=seed)


def hf(x, residual, w, p, seed):
    """T5's layers, with F.dropout's arithmetic on our mask."""
    norm = T5LayerNorm(len(w))
    norm.weight = torch.nn.Parameter(w, requires_grad=False)
    if p > 0.0:
        x = x * keep_mask(tuple(x.shape), p, seed).to(x.dtype).div(1 - p)
    h = residual + x
    return norm(h), h


def exact(x, residual, w, p, seed):
    keep = keep_mask(tuple(x.shape), p, seed) / (1 - p) if p > 0.0 else 1.0
    h = residual + x * keep
    return w.double() * h / (h.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt(), h


def values_and_gradients(function, x, residual, w, p, seed, dy, dh):
    x, residual = x.detach().requires_grad_(), residual.detach().requires_grad_()
    y, h = function(x, residual, w, p, seed)
    dx, dresidual = torch.autograd.grad((y, h), (x, residual), (dy.to(y.dtype), dh.to(h.dtype)))
    return y.detach(), h.detach(), dx, dresidual


def check(shape, dtypes, p, device, number):
    x, residual = (random_rows(shape, dtypes[i], device, number + i) for i in (0, 1))
    w, seed = weight(shape[-1], dtypes[2], device), seed_of(number, device)
    dy = random_rows(shape, dtypes[2], device, number + 2)
    dh = torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(number)).to(device)
    results = values_and_gradients(ours, x, residual, w, p, seed, dy, dh)
    stock = values_and_gradients(hf, x, residual, w, p, seed, dy, dh)
    truth = values_and_gradients(exact, x.double(), residual.double(), w, p, seed, dy, dh)
    h = truth[1]
    rstd = (h.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()
    # Terms cancel in h, and again in the gradient, which then inherits h's rounding.
    terms = residual.double().abs() + x.double().abs() / (1 - p)
    dterms = (rstd * (dy.double() * w.double())).abs() * (rstd * terms).amax(-1, keepdim=True).clamp(min=1)
    dterms = 1 + dterms.amax(-1, keepdim=True)
    yterms = (rstd * w.double().abs().max() * terms).amax(-1, keepdim=True)
    for value, hf_value, true, size in zip(
        results, stock, truth, (yterms, terms, dterms, dterms), strict=True
    ):
        assert_within_budget(value, hf_value, true, magnitude=size)


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtypes", MIXES, ids=lambda dtypes: "-".join(str(d)[6:] for d in dtypes))
def test_values_and_gradients(backend, device, dtypes, p):
    for number, shape in enumerate([(1, 1), (3, 7), (2, 3, 33), (5, 500)]):
        check(shape, dtypes, p, device, number)


@pytest.mark.big
@pytest.mark.parametrize(
    "dtypes", [(d, d, d) for d in FLOATS] + [(torch.float16, torch.float32, torch.float16)]
)
def test_values_and_gradients_of_t5_widths(backend, device, dtypes):
    for D in (768, 1472):
        check((17, D), dtypes, 0.1, device, D)


def test_any_shape(backend, device, examples):
    @settings(max_examples=examples)
    @given(
        st.integers(1, 7), st.integers(1, 130), st.sampled_from(MIXES), st.floats(0, 0.9), st.integers(0, 999)
    )
    def any_case(N, D, dtypes, p, number):
        check((N, D), dtypes, p, device, number)

    any_case()


@pytest.mark.parametrize("dtypes", MIXES, ids=lambda dtypes: "-".join(str(d)[6:] for d in dtypes))
def test_equals_its_parts_bit_for_bit(backend, device, dtypes):
    """h is rounded once; y is the norm of the rounded h."""
    x, residual = (random_rows((6, 77), dtypes[i], device, i) for i in (0, 1))
    w, seed, p = weight(77, dtypes[2], device), seed_of(11, device), 0.3
    y, h = ours(x, residual, w, p, seed)
    dropped = torch.where(keep_mask((6, 77), p, seed), x.float() * keep_scale(p), 0.0)
    assert torch.equal(h, (residual.float() + dropped).to(torch.promote_types(*dtypes[:2])))
    assert torch.equal(y, rms_norm(h, w))
    y, h = ours(x, residual, w, 0.0, None)
    assert torch.equal(h, residual + x)
    assert torch.equal(y, rms_norm(h, w))


@pytest.mark.parametrize("p", [0.0, 1e-9, 0.1, 0.5, 0.999, 1.0])
def test_mask_is_the_same_on_every_backend_and_in_backward(backend, device, p):
    shape, seed, w = (9, 101), seed_of(2**62 + 12345, device), torch.ones(101, device=device)
    x, zero = torch.ones(shape, device=device, requires_grad=True), torch.zeros(shape, device=device)
    y, h = ours(x, zero, w, p, seed)
    expected = keep_mask(shape, p, seed) * keep_scale(p) if p > 0.0 else torch.ones(shape, device=device)
    assert torch.equal(h.detach(), expected.float())
    (dx,) = torch.autograd.grad((y, h), x, (torch.zeros_like(y), torch.ones_like(h)))
    assert torch.equal(dx, expected.float())


def test_what_is_dropped_leaves_nothing_behind(backend, device):
    """Zero, where F.dropout would make NaN of a dropped infinity: 0 * inf. Nor in the gradient."""
    x = torch.tensor([float("inf"), float("-inf"), float("nan"), 3.0] * 8, device=device)[None]
    seed, w, zero = seed_of(4, device), torch.ones(32, device=device), torch.zeros(1, 32, device=device)
    _, h = ours(x, zero, w, 0.5, seed)
    expected = torch.where(keep_mask((1, 32), 0.5, seed), 2 * x, 0.0)
    torch.testing.assert_close(h, expected, equal_nan=True, rtol=0, atol=0)
    dx = values_and_gradients(ours, zero, zero + 1, w, 0.5, seed, zero, x)[2]
    torch.testing.assert_close(dx, expected, equal_nan=True, rtol=0, atol=0)


def test_one_output_used(backend, device):
    x, residual = (random_rows((5, 33), torch.float32, device, i).requires_grad_() for i in (0, 1))
    w, seed = weight(33, torch.float32, device), seed_of(5, device)
    y, h = ours(x, residual, w, 0.2, seed)
    both = torch.autograd.grad((y, h), (x, residual), (y.detach(), torch.zeros_like(h)), retain_graph=True)
    only_y = torch.autograd.grad(y, (x, residual), y.detach())
    assert all(torch.equal(a, b) for a, b in zip(both, only_y, strict=True))


@pytest.mark.falls_back("rms_norm_residual_backward")
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_only_h_used(backend, device, p):
    """What follows the last norm whose output nobody used: no norm in the gradient, only dropout's mask."""
    x, residual = (random_rows((5, 33), torch.float32, device, i).requires_grad_() for i in (0, 1))
    seed = seed_of(5, device)
    _, h = ours(x, residual, weight(33, torch.float32, device), p, seed)
    dh = random_rows((5, 33), torch.float32, device, 2)
    dx, dresidual = torch.autograd.grad(h, (x, residual), dh)
    assert torch.equal(dresidual, dh)
    assert torch.equal(dx, torch.where(keep_mask((5, 33), p, seed), dh * keep_scale(p), 0.0))


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_gradient_goes_only_where_it_is_needed(backend, device, p):
    w, seed = weight(33, torch.bfloat16, device), seed_of(5, device)
    x, residual = (random_rows((5, 33), torch.bfloat16, device, i) for i in (0, 1))
    both = values_and_gradients(ours, x, residual, w, p, seed, x, residual)[2:]
    for index in (0, 1):
        inputs = [x.clone(), residual.clone()]
        inputs[index].requires_grad_()
        y, h = ours(*inputs, w, p, seed)
        torch.autograd.backward((y, h), (x, residual))
        assert torch.equal(inputs[index].grad, both[index])
        assert inputs[1 - index].grad is None
    same = x.clone().requires_grad_()
    y, h = ours(same, same, w, 0.0, None)
    torch.autograd.backward((y, h), (x, residual))
    dx, dresidual = values_and_gradients(ours, x, x, w, 0.0, None, x, residual)[2:]
    assert torch.equal(same.grad, dx + dresidual)


def test_gradients_share_no_memory(backend, device):
    x, residual = (torch.randn(4, 9, device=device, requires_grad=True) for _ in range(2))
    y, _ = ours(x, residual, torch.ones(9, device=device), 0.0, None)
    y.sum().backward()
    before = residual.grad.clone()
    x.grad.zero_()
    assert torch.equal(residual.grad, before)


def test_layout_of_the_inputs_changes_no_bit(backend, device):
    base, residual = (random_rows((4, 6, 33), torch.bfloat16, device, i) for i in (0, 1))
    w, seed = weight(33, torch.bfloat16, device), seed_of(3, device)
    x = base.transpose(0, 1).contiguous().transpose(0, 1)
    strided = residual.repeat_interleave(2, dim=-1)[..., ::2]
    expected = values_and_gradients(ours, base, residual, w, 0.3, seed, base, residual)
    got = values_and_gradients(ours, x, strided, w, 0.3, seed, x, strided)
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0, 7), (7,)], ids=str)
def test_empty_and_vectors(backend, device, shape):
    x, residual = (torch.randn(shape, device=device, requires_grad=True) for _ in range(2))
    w, seed = torch.ones(shape[-1], device=device), seed_of(1, device)
    y, h = ours(x, residual, w, 0.5, seed)
    (y.sum() + h.sum()).backward()
    assert y.shape == h.shape == x.grad.shape == residual.grad.shape == shape


def test_saves_the_stream_one_float_per_row_and_the_seed(backend, device):
    w = torch.nn.Parameter(weight(64, torch.bfloat16, device), requires_grad=False)
    x, residual = (random_rows((10, 64), torch.bfloat16, device, i) for i in (0, 1))
    with saved_bytes() as saved:
        ours(x, residual, w, 0.1, seed_of(1, device))
    assert saved.bytes == 0
    with saved_bytes() as saved:
        kept = ours(x.requires_grad_(), residual, w, 0.1, seed_of(1, device))
    assert saved.bytes == 10 * 64 * 2 + 10 * 4 + 8
    del kept


def test_derivative_of_the_reference():
    x, residual = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    w, seed = torch.randn(4, dtype=torch.float64), torch.tensor([7])
    for p in (0.0, 0.4):
        assert torch.autograd.gradcheck(lambda x, r, p=p: ours(x, r, w, p, seed), (x, residual))

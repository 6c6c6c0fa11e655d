# SPDX-License-Identifier: Apache-2.0
"""gated_act against HF's formula (activation, product, dropout): values, gradients, layouts, what it saves, errors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.activations import ACT2FN

from fastprompt.ops import gated_act
from fastprompt.ops._dropout import keep_mask
from fastprompt.testing import assert_within_budget, saved_bytes

OP = "gated_act"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ACTS = ("gelu_new", "gelu", "silu")
SEED = torch.tensor([2**40 + 7])
SHAPES = [(1,), (3, 7), (2, 5, 33), (9, 128), pytest.param((5, 1031), marks=pytest.mark.big)]


def draw(shape, dtype, device, seed):
    return (3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(device, dtype)


def stock(a, b, act, dropout_p, seed):
    y = ACT2FN[act](a) * b
    if dropout_p == 0.0:
        return y
    return y * keep_mask(tuple(a.shape), dropout_p, seed) / (1.0 - dropout_p)


def exact(a, b, act, dropout_p, seed):
    """Without the cancellation in HF's 1 + tanh(u) and 1 + erf(z), which hides the tail even in float64."""
    if act == "gelu":
        gate = a * torch.special.erfc(-a / 2**0.5) / 2
    else:
        gate = a * torch.sigmoid(a if act == "silu" else (8 / torch.pi) ** 0.5 * (a + 0.044715 * a**3))
    return stock(torch.ones_like(gate), gate * b, "relu", dropout_p, seed)


def ours(a, b, act, dropout_p, seed):
    return gated_act(a, b, act, dropout_p=dropout_p, seed=seed)


def results(function, a, b, act, dropout_p, seed, dy):
    a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
    y = function(a, b, act, dropout_p, seed)
    return y.detach(), *torch.autograd.grad(y, (a, b), dy)


def check(shape, dtype, device, act, dropout_p, number=0):
    a, b, dy = (draw(shape, dtype, device, number + i) for i in range(3))
    seed = SEED.to(device)
    mine = results(ours, a, b, act, dropout_p, seed, dy)
    hf = results(stock, a, b, act, dropout_p, seed, dy)
    truth = results(exact, a.double(), b.double(), act, dropout_p, seed, dy.double())
    # The unit is an ulp of the terms: 1 + tanh(u) and the two terms of act' cancel in the tail.
    scale = 1.0 / (1.0 - dropout_p)
    terms = [(x.double() * y.double() * scale).abs() for x, y in ((a, b), (dy, b), (dy, a))]
    for value, other, true, size in zip(mine, hf, truth, terms, strict=True):
        assert_within_budget(value, other, true, magnitude=size)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_value_and_gradients(backend, device, shape, dtype, act, dropout_p):
    check(shape, dtype, device, act, dropout_p)


def test_any_shape(backend, device, examples):
    @settings(max_examples=examples)
    @given(
        st.lists(st.integers(1, 40), min_size=1, max_size=3),
        st.sampled_from(FLOATS),
        st.sampled_from(ACTS),
        st.sampled_from((0.0, 0.25, 0.9)),
        st.integers(0, 999),
    )
    def any_case(shape, dtype, act, dropout_p, number):
        check(tuple(shape), dtype, device, act, dropout_p, number)

    any_case()


@pytest.mark.parametrize("act", ACTS)
def test_far_from_zero(backend, device, act):
    """Saturated, huge, infinite and not a number: as torch has it where HF's own formula is finite."""
    far = [30.0, -30.0, 70.0, -70.0, 90.0, -90.0, 1e19, -1e19, 1e25, -1e25]
    a = torch.tensor([0.0, -0.0, *far, float("nan")], device=device)
    y, da, db = results(ours, a, torch.ones_like(a), act, 0.0, None, torch.ones_like(a))
    exact = {"gelu": torch.nn.functional.gelu, "silu": torch.nn.functional.silu}.get(
        act, lambda x: torch.nn.functional.gelu(x, approximate="tanh")
    )(a.double())
    torch.testing.assert_close(y.double(), exact, rtol=1e-6, atol=1e-30, equal_nan=True)
    torch.testing.assert_close(db.double(), exact, rtol=1e-6, atol=1e-30, equal_nan=True)
    slope = torch.tensor([0.5, 0.5, *[float(x > 0) for x in far], float("nan")], device=device)
    torch.testing.assert_close(da, slope, rtol=1e-6, atol=1e-8, equal_nan=True)


def test_layout_changes_no_bit(backend, device):
    a, b = draw((6, 10), torch.float32, device, 1), draw((6, 10), torch.float32, device, 2)
    expected = ours(a, b, "gelu_new", 0.5, SEED.to(device))
    assert torch.equal(ours(a.t().contiguous().t(), b, "gelu_new", 0.5, SEED.to(device)), expected)
    joined = torch.cat((a, b), 1)
    assert torch.equal(ours(joined[:, :10], joined[:, 10:], "gelu_new", 0.5, SEED.to(device)), expected)


def test_empty(backend, device):
    a = torch.empty((0, 5), device=device, requires_grad=True)
    y = gated_act(a, a)
    y.sum().backward()
    assert y.shape == a.grad.shape == (0, 5)


def test_everything_dropped(backend, device):
    inf, one = torch.full((3, 9), float("inf"), device=device), torch.ones(3, 9, device=device)
    assert not gated_act(inf, inf, dropout_p=1.0).any()
    assert not any(x.any() for x in results(ours, one, one, "gelu_new", 1.0, SEED.to(device), inf))


def test_saves_its_inputs_and_the_seed(backend, device):
    a, b = (torch.randn(8, 64, device=device, requires_grad=True) for _ in range(2))
    with saved_bytes() as saved:
        gated_act(a, b, dropout_p=0.1)
    assert saved.bytes == a.nbytes + b.nbytes + SEED.nbytes


def test_gradient_of_one_side_only():
    a, b = torch.randn(5), torch.randn(5, requires_grad=True)
    gated_act(a, b).sum().backward()
    assert torch.equal(b.grad, gated_act(a, torch.ones(5)))


def test_gradcheck_in_float64():
    a, b = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    for act in ACTS:
        torch.autograd.gradcheck(lambda x, y, act=act: gated_act(x, y, act, dropout_p=0.3, seed=SEED), (a, b))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            (torch.ones(2, 3), torch.ones(2, 4)),
            ValueError,
            r"b must have shape that of a=\[2, 3\], got \[2, 4\]",
        ),
        ((torch.ones(3), torch.ones(3).half()), TypeError, "b must have dtype float32, got float16"),
        ((torch.ones(3).int(), torch.ones(3).int()), TypeError, "a must have dtype .*, got int32"),
        (
            (torch.ones(3), torch.ones(3), "relu"),
            ValueError,
            "act must be one of gelu_new, gelu, silu, got 'relu'",
        ),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=f"fastprompt::gated_act: {message}"):
        gated_act(*arguments)


@pytest.mark.parametrize(
    ("dy", "message"),
    [
        (torch.ones(2, 4), r"dy must have shape that of a=\[2, 3\], got \[2, 4\]"),
        (torch.ones(2, 3).half(), "dy must have dtype float32, got float16"),
    ],
)
def test_the_bare_backward_refuses(dy, message):
    x = torch.ones(2, 3)
    with pytest.raises((ValueError, TypeError), match=f"^fastprompt::gated_act_backward: {message}"):
        torch.ops.fastprompt.gated_act_backward(dy, x, x, None, "gelu", 0.0)


@pytest.mark.parametrize("dropout_p", [-0.1, 1.1, float("nan")])
def test_dropout_outside_its_range(dropout_p):
    with pytest.raises(ValueError, match=r"fastprompt::gated_act: dropout_p must lie in \[0, 1\]"):
        gated_act(torch.ones(3), torch.ones(3), dropout_p=dropout_p)

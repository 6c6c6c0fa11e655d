# SPDX-License-Identifier: Apache-2.0
"""relu_dropout: exactly torch's ReLU times the mask, forward and backward, with one bit saved per element."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastprompt.ops import relu_dropout
from fastprompt.ops._dropout import keep_mask, keep_scale
from fastprompt.testing import saved_bytes

OP = "relu_dropout"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SEED = torch.tensor([2**40 + 7])
SHAPES = [(1,), (3, 7), (2, 5, 33), (8, 64), (0, 5), pytest.param((5, 1031), marks=pytest.mark.big)]


def expected(x, dy, dropout_p, seed):
    """One rounding, after an fp32 product; zero where dropped."""
    keep = keep_mask(tuple(x.shape), dropout_p, seed)
    y, dx = torch.relu(x).float(), torch.where(x <= 0, 0, dy).float()
    return tuple(torch.where(keep, value * keep_scale(dropout_p), 0.0).to(x.dtype) for value in (y, dx))


def check(shape, dtype, device, dropout_p, number=0):
    generator = torch.Generator().manual_seed(number)
    x, dy = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))
    seed = SEED.to(device)
    leaf = x.clone().requires_grad_()
    y = relu_dropout(leaf, dropout_p=dropout_p, seed=seed)
    (dx,) = torch.autograd.grad(y, leaf, dy)
    want_y, want_dx = expected(x, dy, dropout_p, seed)
    assert torch.equal(y, want_y)
    assert torch.equal(dx, want_dx)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1, 1.0])
def test_value_and_gradient(backend, device, shape, dtype, dropout_p):
    check(shape, dtype, device, dropout_p)


def test_any_shape(backend, device, examples):
    @settings(max_examples=examples)
    @given(
        st.lists(st.integers(0, 40), min_size=1, max_size=3),
        st.sampled_from(FLOATS),
        st.sampled_from((0.0, 0.25, 0.9)),
        st.integers(0, 999),
    )
    def any_case(shape, dtype, dropout_p, number):
        check(tuple(shape), dtype, device, dropout_p, number)

    any_case()


def test_special_values_as_in_torch(backend, device):
    x = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e-45], device=device)
    (leaf, other) = (x.clone().requires_grad_() for _ in range(2))
    y, want = relu_dropout(leaf), torch.relu(other)
    torch.testing.assert_close(y, want, rtol=0, atol=0, equal_nan=True)
    dy = torch.arange(1.0, 7.0, device=device)
    y.backward(dy)
    want.backward(dy)
    assert torch.equal(leaf.grad, other.grad)


def test_layout_changes_no_bit(backend, device):
    x = torch.randn(6, 10, device=device)
    straight = relu_dropout(x, dropout_p=0.5, seed=SEED.to(device))
    assert torch.equal(relu_dropout(x.t().contiguous().t(), dropout_p=0.5, seed=SEED.to(device)), straight)


def test_saves_one_bit_per_element(backend, device):
    x = torch.randn(9, 13, device=device, requires_grad=True)
    with saved_bytes() as saved:
        relu_dropout(x, dropout_p=0.1)
    assert saved.bytes == (9 * 13 + 7) // 8


def test_float64_gradient():
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x: relu_dropout(x, dropout_p=0.3, seed=SEED), x)


def test_errors():
    with pytest.raises(TypeError, match=r"fastprompt::relu_dropout: x must have dtype .*, got int64"):
        relu_dropout(torch.ones(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"fastprompt::relu_dropout: dropout_p must lie in \[0, 1\], got 2"):
        relu_dropout(torch.ones(3), dropout_p=2.0)
    with pytest.raises(ValueError, match=r"kept must have shape \[ceil\(N / 8\)\]=\[2\], got \[1\]"):
        torch.ops.fastprompt.relu_dropout_backward(torch.ones(9), torch.ones(1, dtype=torch.uint8), 0.0)

# SPDX-License-Identifier: Apache-2.0
"""dropout_add: residual plus x by the mask, forward and backward, with only the seed saved."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import around

from fastprompt.ops import dropout_add
from fastprompt.ops._dropout import half_words, keep_mask, keep_scale, philox
from fastprompt.testing import saved_bytes

OP = "dropout_add"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SEED = torch.tensor([2**40 + 7])
SHAPES = [(1,), (3, 7), (2, 5, 33), (8, 64), (0, 5), pytest.param((5, 1031), marks=pytest.mark.big)]


def check(shape, dtype, device, dropout_p, add, number=0):
    """One rounding, after an fp32 product and sum; zero where dropped."""
    generator = torch.Generator().manual_seed(number)
    x, residual, dh = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3))
    seed = SEED.to(device)
    leaves = [x.clone().requires_grad_(), residual.clone().requires_grad_()]
    h = dropout_add(leaves[0], leaves[1] if add else None, dropout_p=dropout_p, seed=seed)
    h.backward(dh)
    keep = keep_mask(shape, dropout_p, seed)
    want, want_dx = (torch.where(keep, v.float() * keep_scale(dropout_p), 0.0) for v in (x, dh))
    if add:
        want = residual + want
        assert torch.equal(leaves[1].grad, dh)
    assert torch.equal(h, want.to(dtype))
    assert torch.equal(leaves[0].grad, want_dx.to(dtype))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("add", [True, False])
def test_value_and_gradients(backend, device, shape, dtype, dropout_p, add):
    check(shape, dtype, device, dropout_p, add)


def test_any_shape(backend, device, examples):
    @settings(max_examples=examples)
    @given(
        st.lists(st.integers(0, 40), min_size=1, max_size=3),
        st.sampled_from(FLOATS),
        st.sampled_from((0.0, 0.25, 0.9)),
        st.booleans(),
        st.integers(0, 999),
    )
    def any_case(shape, dtype, dropout_p, add, number):
        check(tuple(shape), dtype, device, dropout_p, add, number)

    any_case()


def test_an_element_is_kept_from_the_threshold_on(backend, device):
    """A half-word decides, where it is p's or more: p to the nearest 2^-16."""
    seed = SEED.to(device)
    halves = half_words(philox(seed, torch.zeros(1, dtype=torch.int64, device=device)))[0].tolist()
    for dtype, count in itertools.product(FLOATS, (8, 7)):
        x = torch.ones(count, dtype=dtype, device=device)
        for i, half in enumerate(halves[:count]):
            for p, kept in around(half):
                h = dropout_add(x, None, dropout_p=p, seed=seed)
                assert (h[i] > 0) == kept, (dtype, count, i, p)


def test_p_that_rounds_to_one_drops_everything(backend, device):
    """Though its scale is a number, and the largest half-word is drawn here."""
    seed, count, p = SEED.to(device), 2**18, 1 - 2**-18
    halves = half_words(philox(seed, torch.arange(count // 8, device=device)))
    assert (halves == 2**16 - 1).any()
    assert not dropout_add(torch.ones(count, device=device), dropout_p=p, seed=seed).any()


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
def test_every_number_of_two_bytes_is_read_and_written(backend, device, dtype):
    """Infinities, NaNs and subnormals too."""
    x = torch.arange(-(2**15), 2**15, device=device).to(torch.int16).view(dtype)
    h = dropout_add(x, torch.zeros_like(x), dropout_p=0.0)
    torch.testing.assert_close(h, x, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_what_is_dropped_leaves_nothing_behind(backend, device, dtype):
    """Zero, where F.dropout would make NaN of a dropped infinity: 0 * inf."""
    x = torch.tensor([float("inf"), float("-inf"), float("nan"), 3.0] * 8, device=device, dtype=dtype)
    kept = keep_mask((32,), 0.5, SEED.to(device))
    h = dropout_add(x, dropout_p=0.5, seed=SEED.to(device))
    torch.testing.assert_close(h, torch.where(kept, 2 * x, 0.0), equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_no_residual_brings_an_infinity_back(backend, device, dtype):
    """Nor one of its sign, read as a number of the next binade."""
    x = torch.tensor([float("inf"), float("-inf")], device=device, dtype=dtype).repeat(20)
    residual = torch.where(x > 0, -6e4, 6e4).to(dtype)
    assert torch.equal(dropout_add(x, residual, dropout_p=0.0), x)


def test_output_never_shares_memory_with_the_input(backend, device):
    x = torch.randn(4, 4, device=device)
    h = dropout_add(x)
    h.zero_()
    assert x.any()


def test_layout_changes_no_bit(backend, device):
    x, seed = torch.randn(6, 10, device=device), SEED.to(device)
    straight = dropout_add(x, x, dropout_p=0.5, seed=seed)
    twisted = x.t().contiguous().t()
    assert torch.equal(dropout_add(twisted, x, dropout_p=0.5, seed=seed), straight)
    assert torch.equal(dropout_add(x, twisted, dropout_p=0.5, seed=seed), straight)


def test_saves_the_seed_alone(backend, device):
    x = torch.randn(9, 13, device=device, requires_grad=True)
    with saved_bytes() as saved:
        dropout_add(x, x, dropout_p=0.1)
    assert saved.bytes == SEED.nbytes


def test_float64_gradient():
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x: dropout_add(x, x * 2, dropout_p=0.3, seed=SEED), x)


def test_errors():
    with pytest.raises(
        ValueError, match=r"fastprompt::dropout_add: residual must have shape that of x=\[3\], got \[4\]"
    ):
        dropout_add(torch.ones(3), torch.ones(4))
    with pytest.raises(
        TypeError, match="fastprompt::dropout_add: residual must have dtype float32, got bfloat16"
    ):
        dropout_add(torch.ones(3), torch.ones(3).bfloat16())
    with pytest.raises(ValueError, match=r"fastprompt::dropout_add: dropout_p must lie in \[0, 1\], got -1"):
        dropout_add(torch.ones(3), dropout_p=-1.0)

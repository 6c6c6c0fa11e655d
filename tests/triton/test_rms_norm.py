# SPDX-License-Identifier: Apache-2.0
"""rms_norm's Triton kernels against the reference: every mix of dtypes, and rows cut into many tiles."""

from itertools import product

import pytest
import torch
from fastprompt.triton_kernels import rms_norm as kernels

from fastprompt.ops.rms_norm import (
    rms_norm_backward_reference,
    rms_norm_reference,
    rms_norm_residual_backward_reference,
    rms_norm_residual_reference,
)
from fastprompt.testing import assert_within_budget, random_rows

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
EPS = 1e-6


def short(dtype):
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def weight(D, dtype, device):
    return (1 + 0.5 * torch.randn(D)).to(device, dtype)


def seed_on(device):
    return torch.tensor([2**40 + 17], device=device)


@pytest.mark.parametrize(("x_dtype", "w_dtype"), [*product(FLOATS, FLOATS)], ids=short)
def test_plain(tiles, device, x_dtype, w_dtype):
    N, D = 5, 24
    x, w = random_rows((N, D), x_dtype, device), weight(D, w_dtype, device)
    dy = random_rows((N, D), w_dtype, device, seed=1)
    y, rstd = kernels.rms_norm(x, w, EPS)
    stock_y, stock_rstd = rms_norm_reference(x, w, EPS)
    true_y, true_rstd = rms_norm_reference(x.double(), w.double(), EPS)
    assert_within_budget(y, stock_y, true_y, magnitude="element")
    assert_within_budget(rstd, stock_rstd, true_rstd, magnitude="element")
    dx = kernels.rms_norm_backward(dy, x, w, rstd)
    stock_dx = rms_norm_backward_reference(dy, x, w, stock_rstd)
    true_dx = rms_norm_backward_reference(dy.double(), x.double(), w.double(), true_rstd)
    assert_within_budget(dx, stock_dx, true_dx)


@pytest.mark.parametrize(
    ("x_dtype", "residual_dtype", "w_dtype"), [*product(FLOATS, FLOATS, FLOATS)], ids=short
)
def test_residual(device, x_dtype, residual_dtype, w_dtype):
    check_residual(device, (5, 20), (x_dtype, residual_dtype, w_dtype), dropout_p=0.25)


@pytest.mark.parametrize("dropout_p", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("D", [24, 21])
def test_residual_in_tiles(tiles, device, D, dropout_p):
    check_residual(device, (5, D), (torch.bfloat16, torch.float32, torch.bfloat16), dropout_p)


def check_residual(device, shape, dtypes, dropout_p):
    x, residual = random_rows(shape, dtypes[0], device), random_rows(shape, dtypes[1], device, seed=1)
    w, seed = weight(shape[-1], dtypes[2], device), seed_on(device)
    y, h, rstd = kernels.rms_norm_residual(x, residual, w, seed, EPS, dropout_p)
    stock_y, stock_h, stock_rstd = rms_norm_residual_reference(x, residual, w, seed, EPS, dropout_p)
    true_y, true_rstd = rms_norm_reference(stock_h.double(), w.double(), EPS)
    assert torch.equal(h, stock_h)
    assert_within_budget(y, stock_y, true_y, magnitude="element")
    assert_within_budget(rstd, stock_rstd, true_rstd, magnitude="element")

    dy, dh = random_rows(shape, w.dtype, device, seed=2), random_rows(shape, h.dtype, device, seed=3)
    for stream in (dh, None):
        backward = (dy, stream, h, w, stock_rstd, seed, dropout_p, x.dtype, residual.dtype)
        stock = rms_norm_residual_backward_reference(*backward)
        double = [t if t is None else t.double() for t in backward[:5]]
        truth = rms_norm_residual_backward_reference(*double, seed, dropout_p, torch.float64, torch.float64)
        dresidual, dx = (torch.empty_like(t) for t in stock)
        kernels.rms_norm_residual_backward(*backward[:7], dresidual, dx)
        assert_within_budget(dresidual, stock[0], truth[0])
        if dx.numel():
            assert_within_budget(dx, stock[1], truth[1] if truth[1].numel() else truth[0])


def test_nothing_is_launched_for_no_rows(device):
    x, w = torch.empty(0, 3, 8, device=device), torch.ones(8, device=device)
    y, rstd = kernels.rms_norm(x, w, EPS)
    assert (y.shape, rstd.shape) == ((0, 3, 8), (0,))
    assert kernels.rms_norm_backward(y, x, w, rstd).shape == x.shape

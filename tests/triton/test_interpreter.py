# SPDX-License-Identifier: Apache-2.0
"""The repaired interpreter computes on bfloat16 as torch does; every access outside a tensor is an error."""

import os
from operator import add, eq, ge, gt, le, lt, mul, ne, sub, truediv

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="of the interpreter")

BF16 = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)  # all there are


@triton.jit
def cast_kernel(source, target, N: tl.constexpr):
    o = tl.arange(0, N)
    tl.store(target + o, tl.load(source + o).to(target.dtype.element_ty))


@triton.jit
def operator_kernel(a, b, out, OPERATOR: tl.constexpr, N: tl.constexpr):
    o = tl.arange(0, N)
    b_a, b_b = tl.load(a + o), tl.load(b + o)
    if OPERATOR == "add":
        b_out = b_a + b_b
    elif OPERATOR == "sub":
        b_out = b_a - b_b
    elif OPERATOR == "mul":
        b_out = b_a * b_b
    elif OPERATOR == "truediv":
        b_out = b_a / b_b
    elif OPERATOR == "lt":
        b_out = b_a < b_b
    elif OPERATOR == "le":
        b_out = b_a <= b_b
    elif OPERATOR == "gt":
        b_out = b_a > b_b
    elif OPERATOR == "ge":
        b_out = b_a >= b_b
    elif OPERATOR == "eq":
        b_out = b_a == b_b
    elif OPERATOR == "ne":
        b_out = b_a != b_b
    tl.store(out + o, b_out)


@triton.jit
def extremes_kernel(a, b, out, N: tl.constexpr):
    o = tl.arange(0, N)
    b_a, b_b = tl.load(a + o), tl.load(b + o)
    tl.store(out + o, tl.minimum(b_a, b_b))
    tl.store(out + N + o, tl.maximum(b_a, b_b))
    tl.store(out + 2 * N + o, tl.minimum(b_a, b_b, propagate_nan=tl.PropagateNan.ALL))
    tl.store(out + 3 * N + o, tl.maximum(b_a, b_b, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def dot_kernel(a, b, out, N: tl.constexpr):
    o = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out + o, tl.dot(tl.load(a + o), tl.load(b + o)))


@triton.jit
def sum_kernel(source, out, count):
    total = 0.0
    for i in range(count):
        total += tl.load(source + i)
    tl.store(out, total)


@triton.jit
def copy_kernel(source, target, shift_load, shift_store, limit, N: tl.constexpr):
    o = tl.arange(0, N)
    tl.store(target + o + shift_store, tl.load(source + o + shift_load, mask=o < limit), mask=o < limit)


@triton.jit
def atomic_kernel(target, shift, N: tl.constexpr):
    tl.atomic_add(target + tl.arange(0, N) + shift, 1.0)


@triton.jit
def block_kernel(source, target, rows, N: tl.constexpr):
    tile = tl.make_tensor_descriptor(source, shape=[rows, N], strides=[N, 1], block_shape=[4, N])
    tl.store(target + tl.arange(0, 4)[:, None] * N + tl.arange(0, N)[None, :], tile.load([0, 0]))


def cast(source, dtype):
    target = torch.empty(source.shape, dtype=dtype)
    cast_kernel[(1,)](source, target, N=source.numel())
    return target


def same_bits(a, b):
    """Equal, -0 told from 0, and NaN where the other is."""
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return bool(((a.view(bits) == b.view(bits)) | (a.isnan() & b.isnan())).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_every_bfloat16_is_widened_as_in_torch(dtype):
    assert same_bits(cast(BF16, dtype), BF16.to(dtype))


def test_rounding_to_bfloat16_is_torchs():
    bits = torch.randint(-(2**31), 2**31, (2**16,)).to(torch.int32)
    ties = (BF16.view(torch.int16).to(torch.int32) << 16) + 2**15
    for source in (bits.view(torch.float32), ties.view(torch.float32), (ties - 1).view(torch.float32)):
        assert same_bits(cast(source, torch.bfloat16), source.to(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int32, torch.int64], ids=str)
def test_other_casts_to_and_from_bfloat16(dtype):
    source = (100 * torch.randn(1024)).to(dtype)
    assert same_bits(cast(source, torch.bfloat16), source.to(torch.bfloat16))
    source = source.to(torch.bfloat16)
    assert torch.equal(cast(source, dtype), source.to(dtype))


@pytest.mark.parametrize("operator", [add, sub, mul, truediv, lt, le, gt, ge, eq, ne])
def test_operators_on_bfloat16(operator):
    a, b = BF16, BF16[torch.randperm(BF16.numel())]
    expected = operator(a, b)
    out = torch.empty_like(expected)
    operator_kernel[(1,)](a, b, out, OPERATOR=operator.__name__, N=a.numel())
    assert torch.equal(out, expected) if out.dtype == torch.bool else same_bits(out, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_extremes_pass_over_nan_unless_it_is_asked_for(dtype):
    nan = float("nan")
    a, b = torch.tensor([[1.0, nan, 3.0, nan], [2.0, 2.0, nan, nan]], dtype=dtype)
    out = torch.empty(4, 4, dtype=dtype)
    extremes_kernel[(1,)](a, b, out, N=4)
    expected = [torch.fmin(a, b), torch.fmax(a, b), torch.minimum(a, b), torch.maximum(a, b)]
    assert all(map(same_bits, out, expected))


def test_dot_of_bfloat16():
    a, b = torch.randn(2, 32, 32).bfloat16()
    out = torch.empty(32, 32)
    dot_kernel[(1,)](a, b, out, N=32)
    torch.testing.assert_close(out, a.float() @ b.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("error")
def test_loop_up_to_an_argument():
    out = torch.empty(1)
    sum_kernel[(1,)](torch.tensor([1.0, 2.0, 4.0]), out, 2)
    assert out.item() == 3.0


def copy(source, target, shift_load=0, shift_store=0, limit=8):
    copy_kernel[(1,)](source, target, shift_load, shift_store, limit, N=8)


def test_what_is_inside_or_masked_passes():
    source, target = torch.arange(8.0), torch.zeros(8)
    copy(source, target)
    assert torch.equal(target, source)
    copy(source[:3], target[:3], limit=3)
    copy(source[:0], target[:0], limit=0)
    copy(source, target[4:], shift_load=4, limit=4)
    assert target.tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


def test_load_and_store_outside():
    source, target = (
        torch.arange(9.0)[:8],
        torch.zeros(16)[8:],
    )  # both with memory of their own storage beside them
    with pytest.raises(
        InterpreterError, match=r"load out of bounds: 1 of 8 lanes, the first 0 bytes after .*\[8\]"
    ):
        copy(source, target, shift_load=1)
    with pytest.raises(
        InterpreterError, match=r"store out of bounds: 2 of 8 lanes, the first 8 bytes before .*\[8\]"
    ):
        copy(source, target, shift_store=-2)
    with pytest.raises(InterpreterError, match="load out of bounds: 8 of 8 lanes"):
        copy(source[:0], target)


def test_a_pointer_that_strays_into_another_argument():
    both = torch.zeros(16)
    with pytest.raises(InterpreterError, match="load out of bounds"):
        copy(both[:8], both[8:], shift_load=4)


def test_atomic_outside():
    target = torch.zeros(4)
    atomic_kernel[(1,)](target, 0, N=4)
    assert target.tolist() == [1.0] * 4
    with pytest.raises(InterpreterError, match="atomic out of bounds: 1 of 4 lanes"):
        atomic_kernel[(1,)](target, 1, N=4)


def test_tensor_descriptor_larger_than_its_tensor():
    source, target = torch.randn(3, 16), torch.zeros(4, 16)
    block_kernel[(1,)](source, target, 3, N=16)
    assert torch.equal(target[:3], source)
    assert not target[3].any()
    with pytest.raises(InterpreterError, match="load out of bounds: 16 of 64 lanes"):
        block_kernel[(1,)](source, target, 4, N=16)

# SPDX-License-Identifier: Apache-2.0
"""frozen_linear: as exact as PyTorch's own product, and the same bits whatever surrounds a row."""

import sys

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import fastprompt
from fastprompt import _native
from fastprompt.ops import frozen_linear
from fastprompt.ops.frozen_linear import BF16_ROWS, COLUMNS, DEPTH, ROWS
from fastprompt.testing import _ulp, saved_bytes

OP = "frozen_linear"
CPU_TARGETS = [isa for isa in _native.CPU_TARGETS if hasattr(_native.TARGETS[isa], OP)]
page = sys.modules["fastprompt.ops.frozen_linear"]
KERNEL = torch.float32
FEW = 16  # rows: kFewRows of frozen_linear.cpp
SHAPES = [  # M, N, K: whole tiles, edges of every kind, few rows and many, slices of the depth, two panels
    (7, 51, 49),
    (9, 70, 129),
    (13, 1100, 800),
    (16, 48, 48),
    (17, 51, 49),
    (96, 64, 128),
    (103, 70, 129),
    (21, 130, 48),
    (193, 384, 512),
    (100, 1100, 800),
    (301, 64, 128),
    (305, 1100, 800),
]


def draw(M, N, K, number=0, dtype=KERNEL):
    generator = torch.Generator().manual_seed(number)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in ((M, K), (N, K), (M, N))]


def strided(weight, layout):
    """The same weight, rows dense, columns dense, or a part of a larger one."""
    if layout == "columns":
        return weight.mT.contiguous().mT
    if layout == "part":
        return torch.nn.functional.pad(weight, (3, 2))[..., 3:-2]
    return weight


def check(M, N, K, layout="rows", number=0, dtype=KERNEL):
    x, weight, dy = draw(M, N, K, number, dtype)
    placed = strided(weight, layout)
    leaf = x.clone().requires_grad_()
    y = frozen_linear(leaf, placed)
    (dx,) = torch.autograd.grad(y, leaf, dy)
    assert_as_exact(y.detach(), x, weight.t())
    assert_as_exact(dx, dy, weight)


def assert_as_exact(ours, x, b, slack=1.1):
    """Within the bound that rounding sets to any order of summation, and on the whole as close as x @ b.

    The bound is Higham's, K units of roundoff times |x| |b|: a term too many or too few exceeds it. Half precision is
    summed in fp32 and rounded once, by half an ulp; or by PyTorch's library, with errors no larger than its own.
    Of two long sums, whose errors have long tails, only the root mean square tells which order is better, and of a few
    not even that.
    """
    a, c = x.double(), b.double()
    truth, scale, eps = a @ c, (a.square() @ c.square()).sqrt(), torch.finfo(x.dtype).eps
    error, stock_error = ((y.double() - truth) for y in (ours, x @ b))
    assert ours.shape == truth.shape
    sum_eps = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps
    bound = x.shape[1] * sum_eps / 2 * (a.abs() @ c.abs())
    if sum_eps < eps:
        bound = bound + _ulp(torch.maximum(truth.abs(), ours.double().abs()), x.dtype) / 2
    assert bool((error.abs() <= torch.maximum(bound, stock_error.abs())).all())
    rms, stock = ((each / scale).square().mean().sqrt() for each in (error, stock_error))
    assert truth.numel() <= 750 or rms <= slack * stock + 0.1 * eps, (
        f"{rms / eps:.3g} eps, stock {stock / eps:.3g}"
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", ["rows", "columns", "part"])
def test_value_and_gradient(backend, shape, layout):
    check(*shape, layout)


def test_any_shape(backend, examples):
    @settings(max_examples=examples)
    @given(
        st.integers(ROWS, 130),
        st.integers(COLUMNS, 150),
        st.integers(COLUMNS, 300),
        st.sampled_from(("rows", "columns", "part")),
        st.integers(0, 999),
    )
    def any_case(M, N, K, layout, number):
        check(M, N, K, layout, number)

    any_case()


@pytest.fixture
def no_half_instructions(monkeypatch):
    """As on a CPU that has none for bf16 and fp16."""
    monkeypatch.setattr(page, "SLOW_HALVES", (torch.bfloat16, torch.float16))


each_half = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@each_half
@pytest.mark.parametrize("shape", [(1, 48, 48), (3, 70, 129), *SHAPES], ids=str)
@pytest.mark.parametrize("layout", ["rows", "columns", "part"])
def test_half_precision(backend, no_half_instructions, shape, layout, dtype):
    check(*shape, layout, dtype=dtype)


@each_half
@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("M", [1, 3, ROWS, 100, 330])
def test_half_precision_rounds_once(native_backend, no_half_instructions, M, layout, dtype):
    """As among enough rows for the kernel to take them in fp32."""
    x, weight, dy = draw(max(M, ROWS), 70, 600, dtype=dtype)
    half, wide = strided(weight, layout), strided(weight.float(), layout)
    backward = torch.ops.fastprompt.frozen_linear_backward
    expected, expected_dx = frozen_linear(x.float(), wide), backward([dy.float()] * 2, [wide] * 2)
    x, dy = x[:M], dy[:M]
    assert torch.equal(frozen_linear(x, half), expected[:M].to(dtype))
    assert torch.equal(backward([dy, dy], [half] * 2), expected_dx[:M].to(dtype))


@pytest.fixture
def bf16_backend(backend, monkeypatch):
    """One with instructions that multiply bf16. tests/emulation has these tests on any CPU."""
    monkeypatch.setattr(page, "SLOW_HALVES", ())  # where PyTorch multiplies none, all rows are widened
    if backend.removeprefix("cpu:") not in _native.BF16_ISAS:
        frozen_linear(*draw(20, 48, 48)[:2])  # so that it has run
        pytest.skip("multiplies no bf16")
    return backend


FEW_IN_BF16 = [  # M, N, K: part of a vector, of a group of columns, of rows; several of each
    (1, 1, 1),
    (1, 48, 48),
    (2, 17, 31),
    (3, 25, 33),
    (4, 24, 96),
    (5, 2, 7),
    (6, 8, 64),
    (7, 70, 129),
    (8, 23, 32),
    (9, 50, 64),
    (BF16_ROWS - 1, 7, 65),
    (BF16_ROWS, 130, 600),
    (1, 3000, 512),
    (8, 1000, 770),
]


@pytest.mark.parametrize("shape", FEW_IN_BF16, ids=str)
@pytest.mark.parametrize("layout", ["rows", "part"])
def test_few_rows_in_bf16(bf16_backend, shape, layout):
    x, weight, _ = draw(*shape, dtype=torch.bfloat16)
    assert_as_exact(frozen_linear(x, strided(weight, layout)), x, weight.t())


def test_a_row_in_bf16_is_the_same_alone_and_among_others(bf16_backend):
    x, weight, _ = draw(BF16_ROWS, 131, 170, dtype=torch.bfloat16)
    y = frozen_linear(x, weight)
    for count in range(1, BF16_ROWS):
        first = BF16_ROWS - count
        assert torch.equal(frozen_linear(x[first:], weight), y[first:])
    assert torch.equal(frozen_linear(x, weight[40:77]), y[:, 40:77])


def test_a_weight_per_example_in_bf16(bf16_backend):
    x, weight = torch.randn(3, 5, 90).bfloat16(), torch.randn(3, 70, 90).bfloat16()
    y = frozen_linear(x, strided(weight, "part"))
    for b in range(3):
        assert torch.equal(y[b], frozen_linear(x[b], weight[b]))


@pytest.mark.parametrize("M", [3, 5, 13])
def test_rows_in_bf16_that_share_lines_of_the_cache(bf16_backend, M):
    """Rows of x a multiple of 4 KB apart are moved apart first; a row alone is not."""
    x, weight, _ = draw(M, 50, 2048, dtype=torch.bfloat16)
    y = frozen_linear(x, weight)
    assert_as_exact(y, x, weight.t())
    for m in range(M):
        assert torch.equal(frozen_linear(x[m : m + 1], weight), y[m : m + 1])
    each = frozen_linear(torch.stack((x, -x)), torch.stack((weight, weight)))
    assert torch.equal(each, torch.stack((y, -y)))


def test_infinities_and_nan_in_bf16_stay_where_they_are(bf16_backend):
    x, weight, _ = draw(20, 70, 141, dtype=torch.bfloat16)
    x[3, 2], x[5, 140], x[19, 0], weight[8, 7] = *map(float, ("inf", "nan", "-inf")), float("nan")
    y, stock = frozen_linear(x, weight), x.float() @ weight.float().t()
    assert torch.equal(y.isnan(), stock.isnan())
    assert torch.equal(y.isinf(), stock.isinf())


@pytest.mark.falls_back(OP)
def test_more_in_bf16_is_torchs(bf16_backend):
    """More rows, and weights whose rows have gaps: the library multiplies those as fast."""
    x, weight, _ = draw(BF16_ROWS + 1, 48, 64, dtype=torch.bfloat16)
    for rows, placed in ((x, weight), (x[:3], strided(weight, "columns"))):
        y = frozen_linear(rows, placed)
        assert fastprompt.backend_used(OP) == "reference"
        assert torch.equal(y, torch.nn.functional.linear(rows, placed))
    frozen_linear(x[:3], weight)
    assert fastprompt.backend_used(OP) == bf16_backend


@pytest.mark.parametrize("layout", ["rows", "part"])
def test_a_row_or_a_few(backend, layout, examples):
    """Forward, and of a weight whose rows are dense; else they are PyTorch's.

    As close as MKL's on AMD's CPUs. On Intel's, where the kernel is not the default, MKL adds up a row lane by lane.
    """
    slack = 1.1 if _native.CPU_IS_AMD else 2.0

    @settings(max_examples=examples)
    @given(
        st.integers(1, ROWS - 1),
        st.integers(COLUMNS, 150),
        st.integers(DEPTH, 800),
        st.integers(0, 999),
    )
    @example(1, 4000, 512, 0)
    @example(4, 1100, 800, 0)
    def any_case(M, N, K, number):
        x, weight, _ = draw(M, N, K, number)
        assert_as_exact(frozen_linear(x, strided(weight, layout)), x, weight.t(), slack)

    any_case()


@pytest.mark.parametrize("sizes", [(48, 48), (48, 70, 50)], ids=str)
@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("M", [ROWS, 100, 330])
def test_gradients_of_several_layers_add_up(backend, sizes, layout, M):
    drawn = [draw(M, N, 90, number) for number, N in enumerate(sizes)]
    weights, grads = [strided(each[1], layout) for each in drawn], [each[2] for each in drawn]
    dx = torch.ops.fastprompt.frozen_linear_backward(grads, weights)
    assert_as_exact(dx, torch.cat(grads, 1), torch.cat(weights))


@pytest.mark.parametrize("M", [90, 330])
def test_gradients_that_are_zero_where_an_example_is_padded(backend, M):
    """Whole tiles of zeros, parts of one, zeros of either sign, and rows with one element left."""
    _, weight, dy = draw(M, 70, 300)
    _, other, added = draw(M, 50, 300, number=1)
    dy[5:40], dy[60:69], added[12:60] = 0.0, -0.0, 0.0
    dy[20, 69], dy[62, 0], dy[M - 1, :-1] = 0.5, -0.5, 0.0
    dx = torch.ops.fastprompt.frozen_linear_backward([dy], [weight])
    both = torch.ops.fastprompt.frozen_linear_backward([added, dy], [other, weight])
    for ours, rows, columns in (
        (dx, dy, weight),
        (both, torch.cat((added, dy), 1), torch.cat((other, weight))),
    ):
        some = rows.any(1)
        assert_as_exact(ours[some], rows[some], columns)
        assert not ours[~some].any()


@pytest.mark.parametrize("M", [90, 330])
def test_gradients_that_are_zero_in_some_columns(backend, M):
    """More columns than are multiplied at a time, and rows with something in the first or the last of them only."""
    _, weight, dy = draw(M, 1300, 90)
    dy[5:40, :1000], dy[40:70, 20:] = 0.0, 0.0
    assert_as_exact(torch.ops.fastprompt.frozen_linear_backward([dy], [weight]), dy, weight)


@pytest.mark.parametrize("layout", ["rows", "columns", "part"])
def test_a_weight_per_example(backend, layout):
    drawn = [draw(20, 50, 140, number) for number in range(3)]
    x, weight, dy = (torch.stack([each[part] for each in drawn]) for part in range(3))
    leaf, placed = x.clone().requires_grad_(), strided(weight, layout)
    y = frozen_linear(leaf, placed)
    (dx,) = torch.autograd.grad(y, leaf, dy)
    twice = torch.ops.fastprompt.frozen_linear_backward([dy, dy], [placed, placed])
    for b in range(3):
        assert_as_exact(y[b].detach(), x[b], weight[b].t())
        assert_as_exact(dx[b], dy[b], weight[b])
        assert_as_exact(twice[b] / 2, dy[b], weight[b])


def test_a_weight_without_a_dense_dimension_behind_a_dense_one():
    """A kernel that takes the first of several products need not take them all."""
    dy, dense, gaps = torch.randn(8, 64), torch.randn(64, 64), torch.randn(64, 64, 2)[..., 0]
    for name in fastprompt.backends(OP):
        with fastprompt.use_backend(OP, name):
            both = torch.ops.fastprompt.frozen_linear_backward([dy, dy], [dense, gaps])
        torch.testing.assert_close(both, dy @ (dense + gaps), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes_are_torchs(dtype):
    x, weight, _ = draw(20, 12, 10, dtype=dtype)
    assert torch.equal(frozen_linear(x, weight), torch.nn.functional.linear(x, weight))


@pytest.fixture
def native_backend(backend):
    if backend == "reference":
        frozen_linear(*draw(1, 1, 1)[:2])  # so that it has run
        pytest.skip("a promise of the kernels, not of PyTorch's library")
    return backend


@pytest.mark.parametrize(("N", "K"), [(70, 300), (1100, 800)])
def test_a_row_is_the_same_alone_and_among_others(native_backend, N, K):
    """A few have an order of summation of their own, forward; fewer than ROWS are PyTorch's, backward."""
    x, weight, dy = draw(330, N, K)
    backward = torch.ops.fastprompt.frozen_linear_backward
    y, dx = frozen_linear(x, weight), backward([dy], [weight])
    of_few = torch.cat([frozen_linear(some, weight) for some in x.split(FEW)])
    starts = [(7 * count, count) for count in range(1, FEW + 1)]
    for first, count in [*starts, (9, FEW + 1), (7, 23), (95, 98), (100, 130), (20, 305)]:
        some = slice(first, first + count)
        assert torch.equal(frozen_linear(x[some], weight), (of_few if count <= FEW else y)[some])
        if count >= ROWS:
            assert torch.equal(backward([dy[some].contiguous()], [weight]), dx[some])


@pytest.mark.parametrize("M", [200, 400])
def test_threads_change_no_bit(native_backend, one_thread, M):
    x, weight, dy = draw(M, 130, 300)
    backward = torch.ops.fastprompt.frozen_linear_backward
    alone, alone_dx = frozen_linear(x, weight), backward([dy], [weight])
    torch.set_num_threads(3)
    assert torch.equal(frozen_linear(x, weight), alone)
    assert torch.equal(backward([dy], [weight]), alone_dx)


@pytest.mark.parametrize("M", [3, 9, 16])
def test_threads_change_no_bit_of_a_few_rows(native_backend, one_thread, M):
    x, weight, _ = draw(M, 1001, 512)
    alone = frozen_linear(x, weight)
    torch.set_num_threads(3)
    assert torch.equal(frozen_linear(x, weight), alone)


def test_threads_change_no_bit_of_a_few_rows_in_bf16(bf16_backend, one_thread):
    x, weight, _ = draw(9, 1001, 512, dtype=torch.bfloat16)
    alone = frozen_linear(x, weight)
    torch.set_num_threads(3)
    assert torch.equal(frozen_linear(x, weight), alone)


@pytest.mark.parametrize("M", [FEW + 1, 50])
@pytest.mark.skipif(not {"avx2", "avx512"} <= set(CPU_TARGETS), reason="needs a CPU with avx512")
def test_vectors_of_any_width_give_the_same_bits(M):
    """A lane is a column, its chain of fused products the same one. (Scalar code rounds every product.)"""
    x, weight, _ = draw(M, 60, 512)
    results = []
    for backend in ("cpu:avx2", "cpu:avx512"):
        with fastprompt.use_backend(OP, backend):
            results.append(frozen_linear(x, weight))
    assert torch.equal(*results)


def test_infinities_and_nan_stay_in_their_rows(backend):
    x, weight, _ = draw(20, 70, 140)
    x[3, 2], x[5, 139], x[19, 0] = float("inf"), float("nan"), float("-inf")
    y, stock = frozen_linear(x, weight), x @ weight.t()
    assert torch.equal(y.isnan(), stock.isnan())
    assert torch.equal(y.isinf(), stock.isinf())
    assert torch.equal(y[3].sign(), stock[3].sign())


def test_layout_of_the_input_changes_no_bit(backend):
    x, weight, dy = draw(40, 50, 60)
    y = frozen_linear(x, weight)
    assert torch.equal(frozen_linear(x.t().contiguous().t(), weight), y)
    assert torch.equal(frozen_linear(x.view(2, 20, 60), weight).view(40, 50), y)
    dx = torch.ops.fastprompt.frozen_linear_backward([dy], [weight])
    assert torch.equal(torch.ops.fastprompt.frozen_linear_backward([dy.t().contiguous().t()], [weight]), dx)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0, 5), (20, 0), (1, 5), (5, 20), (5,), (20, 31)], ids=str)
@pytest.mark.parametrize("N", [7, 60])
def test_few_or_no_rows_or_columns(shape, N):
    x, weight = torch.randn(shape, requires_grad=True), torch.randn(N, shape[-1])
    y, stock = frozen_linear(x, weight), torch.nn.functional.linear(x, weight)
    assert torch.equal(y, stock)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(dx, torch.autograd.grad(stock.sum(), x)[0])


def test_saves_nothing_but_the_weight(backend):
    x, weight, _ = draw(20, 50, 60)
    with saved_bytes(exclude=[weight]) as saved:
        frozen_linear(x.requires_grad_(), weight)
    assert saved.bytes == 0


@pytest.mark.parametrize("rows", [4, 20])
def test_autocast_changes_nothing(rows):
    x, weight, dy = draw(rows, 50, 60)
    leaf = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = frozen_linear(leaf, weight)
        dx = torch.ops.fastprompt.frozen_linear_backward([dy, dy], [weight, weight])
    assert torch.equal(y, frozen_linear(x, weight))
    assert torch.equal(dx, torch.ops.fastprompt.frozen_linear_backward([dy, dy], [weight, weight]))
    (own,) = torch.autograd.grad(y, leaf, dy)
    assert torch.equal(own, torch.ops.fastprompt.frozen_linear_backward([dy], [weight]))


def test_the_default_is_what_is_faster_here():
    """The kernel on AMD's CPUs with wide vectors, else PyTorch's product; either can be asked for."""
    pays = _native.CPU_IS_AMD and CPU_TARGETS[:1] != ["scalar"] and torch.backends.mkl.is_available()
    assert fastprompt.backends(OP)[0] == ("cpu" if pays else "reference")
    x, weight, _ = draw(20, 50, 60)
    frozen_linear(x, weight)
    assert fastprompt.backend_used(OP) == fastprompt.backends(OP)[0]
    assert set(fastprompt.backends(OP)) >= {"reference", *(f"cpu:{isa}" for isa in CPU_TARGETS)}


@pytest.mark.parametrize(
    ("dtype", "M", "N", "expected"),
    [
        (KERNEL, 1, 64, False),
        (KERNEL, 1, 128, True),
        (KERNEL, 2, 64, False),
        (KERNEL, 2, 128, True),
        (KERNEL, ROWS, 1, True),
        (KERNEL, 900, 1024, True),
        (torch.float16, 1, 64, False),
        (torch.float16, 1, 128, True),
        (torch.bfloat16, 1, 64, False),
        (torch.bfloat16, 1, 128, True),
        (torch.bfloat16, BF16_ROWS, 128, True),
        (torch.bfloat16, BF16_ROWS + 1, 1024, False),
        (torch.float64, 900, 1024, False),
    ],
    ids=str,
)
def test_small_products_are_not_worth_the_hosts_time(monkeypatch, dtype, M, N, expected):
    """On a CPU that multiplies bf16, and no fp16."""
    monkeypatch.setattr(page, "SLOW_HALVES", (torch.float16,))
    monkeypatch.setattr(page, "MULTIPLIES_BF16", True)
    x, weight = torch.empty(M, 512, dtype=dtype), torch.empty(N, 512, dtype=dtype)
    assert page.pays(x, weight) == expected
    assert page.pays_backward(x) == (dtype == torch.float16 or (dtype == KERNEL and M >= ROWS))


def test_float64_gradient():
    x, weight, _ = draw(3, 4, 5, dtype=torch.float64)
    torch.autograd.gradcheck(lambda x: frozen_linear(x, weight), x.requires_grad_())


def case(error, message, **changes):
    return pytest.param(error, message, changes, id=message[:40])


@pytest.mark.parametrize(
    ("error", "message", "changes"),
    [
        case(TypeError, "x must be a torch.Tensor, got list", x=[1.0]),
        case(TypeError, "x must have dtype .*, got int64", x=torch.ones(2, 4, dtype=torch.int64)),
        case(TypeError, "weight must have dtype float32, got bfloat16", weight=torch.ones(3, 4).bfloat16()),
        case(ValueError, r"x must have shape \[..., K\], got a scalar", x=torch.ones(())),
        case(ValueError, r"weight must have shape \[N, K\]=\[N, 4\] or .*, got \[3, 5\]", weight=torch.ones(3, 5)),
        case(ValueError, r"weight must have shape \[N, K\]=\[N, 4\] or .*, got \[4\]", weight=torch.ones(4)),
        case(ValueError, r"x must have shape \[B, M, K\], .*got \[2, 4\]", weight=torch.ones(1, 3, 4)),
        case(ValueError, "weight must be on cpu like x, got meta", weight=torch.ones(3, 4, device="meta")),
        case(ValueError, "weight must be frozen, got requires_grad=True", weight=torch.ones(3, 4, requires_grad=True)),
    ],
)  # fmt: skip
def test_refused_by_name(error, message, changes):
    arguments = {"x": torch.ones(2, 4), "weight": torch.ones(3, 4)} | changes
    with pytest.raises(error, match=f"^fastprompt::frozen_linear: {message}"):
        frozen_linear(**arguments)


@pytest.mark.parametrize(
    ("message", "dy", "weight"),
    [
        ("dy and weight must be as many, one or more, got 0 and 0", [], []),
        ("dy and weight must be as many, one or more, got 1 and 2", [(2, 3)], [(3, 4), (3, 4)]),
        (r"weight must have shape \[N, K\]=\[3, K\] or .*, got \[4, 4\]", [(2, 3)], [(4, 4)]),
        ("all dy must have equal rows, all weights equal K, got", [(2, 3), (5, 3)], [(3, 4), (3, 4)]),
        ("all dy must have equal rows, all weights equal K, got", [(2, 3), (2, 3)], [(3, 4), (3, 5)]),
    ],
)
def test_the_backward_refuses(message, dy, weight):
    with pytest.raises(ValueError, match=f"^fastprompt::frozen_linear_backward: {message}"):
        torch.ops.fastprompt.frozen_linear_backward(list(map(torch.ones, dy)), list(map(torch.ones, weight)))

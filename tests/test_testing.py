# SPDX-License-Identifier: Apache-2.0
"""The checks of fastprompt.testing see what they are made to see."""

import weakref

import pytest
import torch

from fastprompt.testing import assert_within_budget, guarded, poison_empty, random_rows, saved_bytes

EPS = torch.finfo(torch.float32).eps


def results(rows=50, D=40):
    truth = torch.randn(rows, D, dtype=torch.float64)
    return truth.float(), truth


def test_budget_accepts_rounding_and_what_the_stock_does():
    stock, truth = results()
    assert_within_budget(stock, stock, truth, ulps=0, rms_ulps=0)
    assert_within_budget(stock * (1 + EPS), stock, truth, magnitude="element", rms_ulps=2)
    worse = stock * (1 + 100 * EPS)
    assert_within_budget(worse, worse, truth)
    assert_within_budget(stock[:0], stock[:0], truth[:0])
    assert_within_budget(stock[0, 0], stock[0, 0], truth[0, 0])


def test_budget_names_errors_and_the_worst_index():
    stock, truth = results()
    ours = stock.clone()
    ours[7, 3] += 20 * EPS * truth[7].abs().max()
    with pytest.raises(
        AssertionError, match=r"largest error .* ulp, stock .*worst at \(7, 3\).*float32 \[50, 40\]"
    ):
        assert_within_budget(ours, stock, truth)


def test_budget_sees_a_small_error_everywhere():
    """One ulp too much in each element is under the budget of the largest error, not of the rms."""
    stock, truth = results()
    ours = (truth + 1.5 * EPS * truth.abs().amax(-1, keepdim=True)).float()
    with pytest.raises(AssertionError, match="rms error"):
        assert_within_budget(ours, stock, truth, ulps=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_budget_measures_in_ulp(dtype):
    """The next number after 1 is one ulp away, and the next after 3 too, though it is twice as far."""
    for value, step in ((1.0, 1.0), (3.0, 2.0)):
        truth = torch.full((1, 1), value, dtype=torch.float64)
        stock, ours = truth.to(dtype), (truth + step * torch.finfo(dtype).eps).to(dtype)
        assert_within_budget(ours, stock, truth, ulps=1.0)
        with pytest.raises(AssertionError):
            assert_within_budget(ours, stock, truth, ulps=0.99)


def test_budget_measures_rows_elements_or_given_terms():
    truth = torch.tensor([[1.0, 1e-6]], dtype=torch.float64)
    stock = truth.float()
    ours = stock + torch.tensor([0.0, EPS])
    assert_within_budget(ours, stock, truth)
    with pytest.raises(AssertionError):
        assert_within_budget(ours, stock, truth, magnitude="element")
    ours = stock + 1000 * EPS
    assert_within_budget(ours, stock, truth, magnitude=torch.tensor([[1024.0]]))
    with pytest.raises(AssertionError):
        assert_within_budget(ours, stock, truth, magnitude=torch.tensor([[64.0]]))


def test_budget_of_zero_is_zero():
    truth = torch.zeros(2, 3, dtype=torch.float64)
    with pytest.raises(AssertionError):
        assert_within_budget(torch.full((2, 3), 1e-30), truth.float(), truth)


def test_budget_allows_no_new_nan_and_no_lost_infinity():
    stock, truth = results()
    for bad in (float("nan"), float("inf")):
        ours = stock.clone()
        ours[2, 5] = bad
        with pytest.raises(AssertionError, match=r"out of place; worst at \(2, 5\)"):
            assert_within_budget(ours, stock, truth)
        assert_within_budget(ours, ours, truth)  # the stock has it too
        assert_within_budget(stock, ours, truth)  # better than the stock
    truth[3, 3] = 1e6
    half = truth.half()
    assert half[3, 3].isinf()
    assert_within_budget(half, half, truth)
    with pytest.raises(AssertionError, match="out of place"):
        assert_within_budget(half.nan_to_num(), half, truth)


def test_budget_wants_equal_shapes_and_dtypes():
    stock, truth = results()
    for ours, wrong_truth in ((stock[:1], truth), (stock.half(), truth), (stock, truth.float())):
        with pytest.raises(AssertionError):
            assert_within_budget(ours, stock, wrong_truth)


def test_poison_empty_shows_what_is_left_unwritten():
    x = torch.ones(3, dtype=torch.bfloat16)
    with poison_empty():
        for memory in (
            torch.empty(3),
            torch.empty_like(x),
            x.new_empty((2, 2)),
            torch.empty_strided((2,), (2,)),
        ):
            assert memory.isnan().all()
        assert (torch.empty(3, dtype=torch.int64) == torch.iinfo(torch.int64).max).all()
        assert torch.equal(torch.zeros(2), torch.tensor([0.0, 0.0]))
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()


def test_poison_empty_ends_with_an_exception():
    with pytest.raises(KeyError), poison_empty():
        raise KeyError
    assert not torch.are_deterministic_algorithms_enabled()


def outside(tensor, index):
    """The element ``index`` of the memory that ``tensor`` begins in, inside it or not."""
    return tensor.as_strided((1,), (1,), tensor.storage_offset() + index)


def test_guarded_copies_stand_at_an_offset_among_sentinels():
    x, ids = torch.randn(3, 5).half(), torch.arange(4)
    for offset in range(5):
        with guarded(x, ids, offset=offset) as (a, b):
            assert torch.equal(a, x)
            assert torch.equal(b, ids)
            assert a.is_contiguous()
            assert a.data_ptr() % 64 == 2 * offset
            assert b.data_ptr() % 64 == 8 * offset
            assert outside(a, -1).isnan().item()
            assert outside(a, 15).isnan().item()
            assert outside(b, 4).item() == outside(b, -1).item() == -1
            a.fill_(7.0)  # inside: allowed


@pytest.mark.parametrize(
    ("index", "message"), [(-1, "1 bytes before its"), (-3, "9 bytes before"), (15, "1 bytes past its end")]
)
def test_guarded_sees_a_write_outside(index, message):
    with (
        pytest.raises(AssertionError, match=f"tensor 1: a write .*{message}"),
        guarded(torch.ones(2), torch.ones(15)) as (_, x),
    ):
        outside(x, index).fill_(1.0)


def test_guarded_lets_an_exception_through():
    def fail_inside():
        with guarded(torch.ones(2)) as (x,):
            outside(x, -1).fill_(1.0)
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()


def test_saved_bytes_leaves_nothing_behind():
    x = torch.randn(5, requires_grad=True)
    with saved_bytes() as saved:
        y = x.exp()  # saves its output
        (gradient,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    assert torch.equal(gradient, y)
    gone = weakref.ref(y)
    del y, gradient, saved
    assert gone() is None


def test_saved_bytes_counts_each_storage_once_and_no_parameter():
    x, w = torch.randn(10, 4, requires_grad=True), torch.nn.Parameter(torch.randn(4))
    with saved_bytes() as saved:
        a = x * w  # saves x and w
        b = a.sin()  # saves a
        c = b.sum(0) * a[0]  # a view of a, and a row of its own
    assert saved.bytes == 160 + 160 + 16
    del c
    frozen = torch.randn(4, 4)
    with saved_bytes(exclude=[frozen]) as saved:
        a @ frozen.t()
    assert saved.bytes == 0
    with saved_bytes() as saved, torch.no_grad():
        a @ frozen
    assert saved.bytes == 0


def test_random_rows_are_reproducible_and_of_many_norms():
    rows = random_rows((4, 2, 400), torch.float64, torch.device("cpu"), seed=3)
    assert torch.equal(rows, random_rows((4, 2, 400), torch.float64, torch.device("cpu"), seed=3))
    norms = rows.norm(dim=-1).reshape(2, 4)
    torch.testing.assert_close(
        norms, torch.tensor([1.0, 2000.0, 1e-3, 30.0]).double().expand(2, 4), rtol=0.2, atol=0
    )
    assert random_rows((0, 3), torch.half, torch.device("cpu")).shape == (0, 3)

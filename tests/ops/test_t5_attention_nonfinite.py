# SPDX-License-Identifier: Apache-2.0
"""NaN and infinity in t5_attention: they spread as in Hugging Face's, and not from keys that are not read."""

import pytest
import torch
from attention_case import MARKS, Case, assert_finite_where_hf_is, key_mask, queries

OP = "t5_attention"
pytestmark = MARKS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_spread_as_in_hf(backend, device, value, p, dtype, T):
    """Into the gradients, too. A weight or its gradient that is NaN is so in PyTorch where it is dropped, too."""
    for which in range(5):
        ids = torch.tensor([0, 1], device=device)
        case = Case(device, dtype, B=2, T=queries(backend, T), S=7, P=3, prompt_ids=ids, dropout_p=p)
        case.tensors[which][0, 1, 0, 2] = value
        ours, stock = assert_finite_where_hf_is(case)
        if dtype == torch.float32:
            torch.testing.assert_close(ours[0][1], stock[0][1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_nan_spreads_in_rows_that_may_attend_to_nothing(backend, device, p, T):
    """They read all values of their example."""
    case = Case(device, T=queries(backend, T), key_mask=key_mask("nothing", 2, 11, device), dropout_p=p)
    case.v[1, 8, 0, 2] = float("nan")
    assert_finite_where_hf_is(case)


@pytest.mark.parametrize("T", [3, 9, 40])
def test_nan_spreads_in_rows_that_may_attend_to_nothing_and_that_nothing_reads(backend, device, T):
    """Zero times NaN is NaN in their gradients."""
    case = Case(device, T=queries(backend, T), key_mask=key_mask("nothing", 2, 11, device))
    case.v[1, 8, 0, 2], case.dout[:] = float("nan"), 0.0
    assert_finite_where_hf_is(case)


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("T", [3, 9, 40])
def test_scores_that_are_all_minus_infinity(backend, device, T, p):
    """Keys are allowed, so the row takes no mean: its weights are NaN."""
    case = Case(device, T=queries(backend, T), S=4, dropout_p=p)
    case.q[0, 1, 0], case.k[0, :, 0] = -float("inf"), 1.0
    assert_finite_where_hf_is(case)


@pytest.mark.parametrize("T", [3, 9, 40])
@pytest.mark.parametrize("what", ["scores", "bias"])
def test_rows_that_nothing_reads_and_whose_weights_are_nan(backend, device, T, what):
    """All scores of a row are -infinity, or the table has a NaN for one of its distances."""
    case = Case(device, T=queries(backend, T), S=4)
    case.dout[:, :2] = 0.0
    if what == "scores":
        case.q[0, 1, 0], case.k[0, :, 0] = -float("inf"), 1.0
    elif backend != "triton":  # whose tiles reach past the last key and query, where NaN may come from, too
        case.bias[0, case.bias.shape[1] // 2 + 3] = float("nan")  # of the last key and the first query alone
    assert_finite_where_hf_is(case)


@pytest.mark.parametrize("T", [3, 9, 40])
def test_scores_of_minus_infinity_before_all_others(backend, device, slow, T):
    """Keys with a weight of zero, as many as a kernel takes at once: there is no largest score yet."""
    many = 20 if slow else 300
    case = Case(device, T=queries(backend, T), S=many + 10)
    case.q[..., 0], case.k[:, :many, :, 0] = 1.0, -float("inf")
    ours, _ = assert_finite_where_hf_is(case)
    assert ours[0].isfinite().all()


def test_keys_that_are_masked_are_not_read(backend, device):
    case = Case(device, S=9, key_mask=key_mask("right", 2, 9, device))
    expected = case.ours(*case.tensors)
    for x in case.tensors[1:]:
        x[~case.options["key_mask"]] = float("nan")
    assert torch.equal(case.ours(*case.tensors), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_keys_behind_all_queries_are_not_read(backend, device, p, dtype, T):
    T = queries(backend, T)
    case = Case(device, dtype, T=T, S=T + 4, causal=True, dropout_p=p)
    expected = case.results(case.ours, case.tensors)
    case.k[:, T:], case.v[:, T:] = float("nan"), float("nan")
    for x, y in zip(case.results(case.ours, case.tensors), expected, strict=True):
        if backend == "triton":  # reads whole tiles: NaN may spread there as in HF
            x = x.where(~x.isnan(), y)
        assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("T", [3, 9, 40])
def test_masked_keys_beside_infinite_scores(backend, device, T, dtype):
    """A row with such a score is NaN, and none that may attend to nothing: masked keys get nothing from it but NaN."""
    case = Case(device, dtype, T=queries(backend, T), key_mask=key_mask("right", 2, 11, device))
    case.q[:, 1, :, 0], case.k[:, 0, :, 0] = float("inf"), 1.0
    _, dq, dk, dv = case.results(case.ours, case.tensors)
    masked = ~case.options["key_mask"]
    assert masked.any()
    assert dq[:, 1].isnan().all()
    assert not dk[masked].nan_to_num(0.0).any()
    assert not dv[masked].nan_to_num(0.0).any()

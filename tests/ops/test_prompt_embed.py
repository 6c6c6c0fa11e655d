# SPDX-License-Identifier: Apache-2.0
"""prompt_embed's output, bit for bit: PEFT's lookup, repeat, cast and cat, and what PEFT has no words for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F  # noqa: N812

from fastprompt.ops import prompt_embed
from fastprompt.ops._dropout import keep_mask, keep_scale

OP = "prompt_embed"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# (weight, prompts): one dtype, or a float32 master copy of the prompts
MIXES = [(dtype, dtype) for dtype in FLOATS] + [
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
]


def peft(input_ids, weight, prompt):
    repeated = prompt.repeat(len(input_ids), 1, 1).to(weight.dtype)
    return torch.cat((repeated, F.embedding(input_ids, weight)), dim=1)


def packed_rows(token_lists, weight, chosen):
    rows = (
        torch.cat((p.to(weight.dtype), weight[i.long()])) for p, i in zip(chosen, token_lists, strict=True)
    )
    return torch.cat([weight[:0], *rows])


def padded_rows(input_ids, weight, chosen):
    """[B, L, D]; zero rows after the tokens of a row with a shorter prompt."""
    L = max(map(len, chosen), default=0) + input_ids.shape[1]
    rows = [torch.cat((p.to(weight.dtype), weight[i.long()])) for p, i in zip(chosen, input_ids, strict=True)]
    padded = [F.pad(row, (0, 0, 0, L - len(row))) for row in rows]
    return torch.stack(padded) if padded else weight.new_zeros(0, L, weight.shape[1])


def drop(rows, p, seed):
    return torch.where(keep_mask(tuple(rows.shape), p, seed), rows * keep_scale(p), 0.0) if p > 0.0 else rows


def cumulative(lengths, device):
    return torch.tensor([0, *lengths], device=device).cumsum(0)


@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("dtypes", MIXES, ids=lambda dtypes: "-".join(str(d)[6:] for d in dtypes))
def test_equals_peft(backend, device, dtypes, id_dtype):
    for B, P, S, V, D in [(1, 1, 1, 1, 1), (2, 5, 4, 11, 7), (3, 20, 5, 50, 33), (2, 3, 2, 9, 500)]:
        weight, prompt = torch.randn(V, D).to(device, dtypes[0]), torch.randn(P, D).to(device, dtypes[1])
        input_ids = torch.randint(V, (B, S), dtype=id_dtype, device=device)
        out = prompt_embed(input_ids, weight, prompt)
        assert out.dtype == dtypes[0]
        assert torch.equal(out, peft(input_ids, weight, prompt))


@pytest.mark.big
@pytest.mark.parametrize("D", [768, 1472])
def test_t5_widths(backend, device, D):
    weight, prompt = torch.randn(100, D, device=device).bfloat16(), 60 * torch.randn(20, D, device=device)
    input_ids = torch.randint(100, (7, 13), device=device)
    assert torch.equal(prompt_embed(input_ids, weight, prompt), peft(input_ids, weight, prompt))


def test_any_prompts_and_layout(backend, device, examples):
    """Prompts of any lengths, chosen in any order, padded or packed, with or without dropout."""

    @settings(max_examples=examples)
    @given(st.data())
    def any_case(data):
        lengths = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=4))
        token_counts = data.draw(st.lists(st.integers(0, 6), max_size=5))
        ids_of_prompts = [data.draw(st.integers(0, len(lengths) - 1)) for _ in token_counts]
        V, D, S = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 70)), data.draw(st.integers(0, 6))
        dtypes, p = data.draw(st.sampled_from(MIXES)), data.draw(st.sampled_from([0.0, 0.25]))
        id_dtype = data.draw(st.sampled_from([torch.int32, torch.int64]))
        torch.manual_seed(data.draw(st.integers(0, 99)))
        seed, B = torch.randint(2**62, (1,), device=device), len(token_counts)
        weight = torch.randn(V, D).to(device, dtypes[0])
        prompts = [torch.randn(n, D).to(device, dtypes[1]) for n in lengths]
        chosen = [prompts[i] for i in ids_of_prompts]
        input_ids = torch.randint(V, (B, S), dtype=id_dtype, device=device)
        out = prompt_embed(input_ids, weight, prompts, ids_of_prompts, dropout_p=p, seed=seed)
        assert torch.equal(out, drop(padded_rows(input_ids, weight, chosen), p, seed))
        token_lists = [torch.randint(V, (n,), dtype=id_dtype, device=device) for n in token_counts]
        flat, ends = torch.cat([input_ids.new_zeros(0), *token_lists]), cumulative(token_counts, device)
        rows, cu_rows = prompt_embed(
            flat, weight, prompts, ids_of_prompts, cu_seqlens=ends, dropout_p=p, seed=seed
        )
        assert torch.equal(rows, drop(packed_rows(token_lists, weight, chosen), p, seed))
        totals = [len(a) + len(b) for a, b in zip(chosen, token_lists, strict=True)]
        assert torch.equal(cu_rows, cumulative(totals, device))

    any_case()


def test_bank_of_prompts_equals_a_list(backend, device):
    weight, bank = torch.randn(9, 6, device=device), torch.randn(3, 4, 6, device=device)
    input_ids = torch.randint(9, (5, 2), device=device)
    choice = torch.tensor([2, 0, 2, 1, 0])
    expected = prompt_embed(input_ids, weight, list(bank), choice.tolist())
    assert torch.equal(prompt_embed(input_ids, weight, bank, choice), expected)
    assert torch.equal(prompt_embed(input_ids, weight, bank, choice.to(device)), expected)
    assert torch.equal(prompt_embed(input_ids, weight, bank), peft(input_ids, weight, bank[0]))


def test_layout_of_the_inputs_changes_no_bit(backend, device):
    weight, prompt = torch.randn(9, 33, device=device), torch.randn(4, 33, device=device)
    input_ids = torch.randint(9, (3, 5), device=device)
    expected = peft(input_ids, weight, prompt)
    one_on = torch.cat((weight.reshape(-1)[:1], weight.reshape(-1)))[1:].view(weight.shape)
    for w, p, ids in (
        (weight.t().contiguous().t(), prompt, input_ids),
        (weight, prompt.repeat_interleave(2, dim=1)[:, ::2], input_ids),
        (weight, prompt, input_ids.t().contiguous().t()),
        (one_on, prompt, input_ids),
    ):
        assert torch.equal(prompt_embed(ids, w, p), expected)
    same = input_ids[:1].expand(3, 5)
    assert torch.equal(prompt_embed(same, weight, prompt), peft(same, weight, prompt))
    ends = torch.tensor([0, -1, 5, -1, 9, -1, 15, -1], device=device, dtype=torch.int32)[::2]
    rows, _ = prompt_embed(input_ids.reshape(-1), weight, prompt, cu_seqlens=ends)
    assert torch.equal(rows, packed_rows(input_ids.reshape(-1).split([5, 4, 6]), weight, [prompt] * 3))


@pytest.mark.parametrize(("B", "P", "S"), [(1, 3, 4), (3, 0, 4), (3, 2, 0), (1, 1, 0), (1, 0, 1)])
def test_a_missing_part(backend, device, B, P, S):
    weight, prompt = torch.randn(9, 6, device=device), torch.randn(P, 6, device=device, requires_grad=True)
    input_ids = torch.randint(9, (B, S), device=device)
    out = prompt_embed(input_ids, weight, prompt)
    assert torch.equal(out, peft(input_ids, weight, prompt))
    out.sum().backward()
    assert torch.equal(prompt.grad, torch.full_like(prompt, B))


@pytest.mark.parametrize(("B", "P", "S", "D"), [(0, 3, 4, 6), (2, 0, 0, 6), (0, 0, 0, 6), (2, 3, 4, 0)])
def test_nothing_at_all(backend, device, B, P, S, D):
    weight, prompt = torch.randn(9, D, device=device), torch.randn(P, D, device=device, requires_grad=True)
    input_ids = torch.randint(9, (B, S), device=device)
    out = prompt_embed(input_ids, weight, prompt)
    assert out.shape == (B, P + S, D)
    out.sum().backward()
    assert torch.equal(prompt.grad, torch.zeros_like(prompt))
    rows, cu_rows = prompt_embed(input_ids.new_zeros(0), weight, prompt, cu_seqlens=cumulative([], device))
    assert rows.shape == (0, D)
    assert cu_rows.tolist() == [0]


def test_several_sequences_without_rows_in_a_row(backend, device):
    """Of no tokens and a prompt of no rows: in front, between others and behind."""
    prompts = [torch.empty(0, 5, device=device), torch.randn(2, 5, device=device)]
    weight, ids = torch.randn(9, 5, device=device), torch.tensor([3, 1, 4, 1], device=device)
    ends = torch.tensor([0, 0, 0, 1, 1, 1, 1, 4, 4, 4], device=device)
    out, _ = prompt_embed(ids, weight, prompts, [0, 0, 1, 0, 0, 0, 1, 0, 0], cu_seqlens=ends)
    assert torch.equal(out, torch.cat((prompts[1], weight[ids[:1]], prompts[1], weight[ids[1:]])))


@pytest.mark.parametrize("p", [1e-9, 0.1, 0.999, 1.0])
@pytest.mark.parametrize("D", [33, 1100])  # the CPU's kernels take long rows in parts
def test_dropout_is_the_same_on_every_backend_and_in_backward(backend, device, p, D):
    weight, prompt = torch.ones(3, D, device=device), torch.ones(5, D, device=device, requires_grad=True)
    input_ids = torch.randint(3, (4, 6), device=device)
    seed = torch.tensor([2**62 + 999], device=device)
    factors = keep_mask((4, 11, D), p, seed) * keep_scale(p)
    out = prompt_embed(input_ids, weight, prompt, dropout_p=p, seed=seed)
    assert torch.equal(out.detach(), factors.float())
    out.sum().backward()
    torch.testing.assert_close(prompt.grad, factors.float()[:, :5].sum(0), rtol=1e-6, atol=0)


def test_what_is_dropped_leaves_nothing_behind(backend, device):
    prompt = torch.tensor([float("inf"), float("-inf"), float("nan"), 3.0] * 8, device=device)[None]
    seed, ids = torch.tensor([4], device=device), torch.zeros(1, 0, dtype=torch.int64, device=device)
    leaf = prompt.clone().requires_grad_()
    out = prompt_embed(ids, torch.ones(1, 32, device=device), leaf, dropout_p=0.5, seed=seed)
    expected = torch.where(keep_mask((1, 1, 32), 0.5, seed), 2 * prompt, 0.0)
    torch.testing.assert_close(out.detach(), expected, equal_nan=True, rtol=0, atol=0)
    out.backward(prompt[None])
    torch.testing.assert_close(leaf.grad, expected[0], equal_nan=True, rtol=0, atol=0)


@pytest.mark.big
@pytest.mark.parametrize("D", [1024, 1000])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_an_output_larger_than_the_caches(backend, device, dtype, D):
    """A CPU writes it past them where rows are whole lines of 64 bytes, as 1024 numbers are and 1000 not."""
    weight, prompt = torch.randn(50, D).to(device, dtype), torch.randn(20, D).to(device, dtype)
    input_ids = torch.randint(50, (2**24 // (D * 100 * weight.element_size()) + 1, 80), device=device)
    assert torch.equal(prompt_embed(input_ids, weight, prompt), peft(input_ids, weight, prompt))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rounding_of_a_master_copy(backend, device, dtype):
    """Halfway cases, overflow to infinity, subnormals, infinities and NaNs of any payload round as in torch."""
    eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).tiny
    values = [1 + eps / 2, 1 + 3 * eps / 2, -1 - eps / 2, 65520.0, 65519.0, 3.4e38, tiny / 3, 1e-40, -0.0]
    nans = torch.tensor([0x7F800001, 0x7FC00000, 0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    prompt = torch.cat((torch.tensor([*values, float("inf"), float("-inf")]), nans))[None].to(device)
    weight = torch.zeros(1, prompt.shape[1], device=device, dtype=dtype)
    out = prompt_embed(torch.zeros(1, 0, dtype=torch.int64, device=device), weight, prompt)[0]
    torch.testing.assert_close(out, prompt.to(dtype), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(out.signbit()[:, :-3], prompt.signbit()[:, :-3])

# SPDX-License-Identifier: Apache-2.0
"""prompt_embed's gradient: into the prompts only, the same bits always, and never of the vocabulary's size."""

import itertools

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from fastprompt.ops import prompt_embed
from fastprompt.ops._dropout import keep_mask
from fastprompt.ops.prompt_embed import prompt_embed_backward_reference
from fastprompt.testing import assert_within_budget, random_rows, saved_bytes

OP = "prompt_embed"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MIXES = [(dtype, dtype) for dtype in FLOATS] + [
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
]


def gradient(input_ids, weight, prompts, dout, *choice, **options):
    leaf = prompts.detach().requires_grad_()
    prompt_embed(input_ids, weight, leaf, *choice, **options).backward(dout)
    return leaf.grad


def peft_gradient(input_ids, weight, prompt, dout):
    leaf = prompt.detach().requires_grad_()
    repeated = leaf.repeat(len(input_ids), 1, 1).to(weight.dtype)
    torch.cat((repeated, F.embedding(input_ids, weight)), dim=1).backward(dout)
    return leaf.grad


@pytest.mark.parametrize("dtypes", MIXES, ids=lambda dtypes: "-".join(str(d)[6:] for d in dtypes))
@pytest.mark.parametrize(
    ("B", "P", "S", "D"), [(1, 1, 1, 1), (5, 3, 2, 7), (37, 4, 1, 33), (3, 5, 2, 500), (130, 2, 1, 100)]
)
def test_no_worse_than_peft(backend, device, dtypes, B, P, S, D):
    weight, prompt = torch.randn(9, D).to(device, dtypes[0]), torch.randn(P, D).to(device, dtypes[1])
    input_ids = torch.randint(9, (B, S), device=device)
    dout = random_rows((B, P + S, D), dtypes[0], device)
    truth = dout[:, :P].double().sum(0)
    terms = dout[:, :P].double().abs().sum(0)
    assert_within_budget(
        gradient(input_ids, weight, prompt, dout),
        peft_gradient(input_ids, weight, prompt, dout),
        truth, magnitude=terms, ulps=0.5, rms_ulps=0.05,
    )  # fmt: skip


def test_sum_over_a_large_batch_is_compensated(backend, device, slow):
    """One large term, then many that plain fp32 addition would lose: 1 + 999 * 2^-25 stays 1 in it."""
    B = 100 if slow else 1000
    dout = torch.full((B, 1, 3), 2.0**-25, device=device)
    dout[0] = 1.0
    input_ids = torch.zeros(B, 0, dtype=torch.int64, device=device)
    got = gradient(input_ids, torch.ones(1, 3, device=device), torch.ones(1, 3, device=device), dout)
    exact = torch.full((1, 3), 1 + (B - 1) * 2.0**-25, dtype=torch.float64, device=device)
    assert torch.equal(got, exact.float())


@pytest.mark.parametrize(
    "dtypes",
    [*MIXES[:-2], *(pytest.param(mix, marks=pytest.mark.big) for mix in MIXES[-2:])],
    ids=lambda dtypes: "-".join(str(d)[6:] for d in dtypes),
)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_same_bits_as_the_reference(backend, device, slow, dtypes, packed, p):
    """On every backend, again, and on any number of threads: one order of addition."""
    B, D, lengths = 5 if slow else 23, 77, torch.tensor([3, 0, 9, 4])
    choice = torch.randint(4, (B,))
    begins = lengths.cumsum(0) - lengths
    starts, lens = begins[choice].to(device), lengths[choice].to(device)
    prompts = torch.empty(16, D, dtype=dtypes[1], device=device)
    cu_rows = torch.cat((lens.new_zeros(1), (lens + torch.randint(4, (B,)).to(device)).cumsum(0)))
    shape = (int(cu_rows[-1]), D) if packed else (B, 11, D)
    dout, seed = random_rows(shape, dtypes[0], device), torch.tensor([77], device=device)
    arguments = (dout, prompts, starts, lens, cu_rows if packed else None, seed, p)
    expected = prompt_embed_backward_reference(*arguments)
    threads = torch.get_num_threads()
    try:
        for count in (threads,) if slow else (threads, threads, 1):
            torch.set_num_threads(count)
            assert torch.equal(torch.ops.fastprompt.prompt_embed_backward(*arguments), expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.big
def test_same_bits_on_several_threads(backend, device):
    """Large enough for the parallel path."""
    weight, prompt = torch.ones(3, 256, device=device), torch.zeros(20, 256, device=device)
    input_ids, dout = (
        torch.zeros(9, 4, dtype=torch.int64, device=device),
        random_rows((9, 24, 256), torch.float32, device),
    )
    expected = prompt_embed_backward_reference(dout, prompt, None, None, None, None, 0.0)
    assert torch.equal(gradient(input_ids, weight, prompt, dout), expected)


@pytest.mark.parametrize("packed", [False, True])
def test_each_prompt_gets_the_sum_of_its_uses(backend, device, packed):
    weight = torch.randn(9, 5, device=device)
    prompts = [torch.randn(n, 5, device=device, requires_grad=True) for n in (2, 4, 3, 1)]
    choice, ids = [2, 0, 2, 2, 1], torch.randint(9, (5, 3), device=device)
    if packed:
        ends = torch.arange(0, 16, 3, device=device)
        rows, cu_rows = prompt_embed(ids.reshape(-1), weight, prompts, choice, cu_seqlens=ends)
        sequences = [rows[a:b] for a, b in itertools.pairwise(cu_rows)]
    else:
        sequences = list(prompt_embed(ids, weight, prompts, choice))
    sum((b + 1) * sequence.sum() for b, sequence in enumerate(sequences)).backward()
    uses = [2, 5, 1 + 3 + 4, 0]  # sums of b + 1 over the rows that chose the prompt
    for prompt, use in zip(prompts, uses, strict=True):
        assert torch.equal(prompt.grad, torch.full_like(prompt, use))


def test_padded_equals_packed(backend, device):
    weight, prompt = torch.randn(9, 33, device=device), torch.randn(4, 33, device=device)
    input_ids, dout = torch.randint(9, (6, 5), device=device), torch.randn(6, 9, 33, device=device)
    padded = prompt.clone().requires_grad_()
    out = prompt_embed(input_ids, weight, padded)
    out.backward(dout)
    packed = prompt.clone().requires_grad_()
    ends = torch.arange(0, 31, 5, device=device)
    rows, _ = prompt_embed(input_ids.reshape(-1), weight, packed, cu_seqlens=ends)
    rows.backward(dout.reshape(-1, 33))
    assert torch.equal(rows.view(out.shape), out)
    assert torch.equal(padded.grad, packed.grad)


def test_dropout_mask_of_the_forward_pass(backend, device):
    weight, prompt = torch.ones(3, 9, device=device), torch.ones(5, 9, device=device)
    seed, input_ids = torch.tensor([5], device=device), torch.zeros(1, 2, dtype=torch.int64, device=device)
    dout = torch.full((1, 7, 9), 3.0, device=device)
    got = gradient(input_ids, weight, prompt, dout, dropout_p=0.5, seed=seed)
    assert torch.equal(got, keep_mask((1, 7, 9), 0.5, seed)[0, :5] * 6.0)


def test_layout_of_the_gradient_changes_no_bit(backend, device):
    weight, prompt = torch.ones(3, 33, device=device), torch.zeros(4, 33, device=device)
    ids, dout = torch.zeros(5, 2, dtype=torch.int64, device=device), torch.randn(5, 6, 33, device=device)
    expected = gradient(ids, weight, prompt, dout)
    assert torch.equal(
        gradient(ids, weight, prompt, dout.transpose(0, 1).contiguous().transpose(0, 1)), expected
    )
    ones = torch.ones((), device=device).expand(5, 6, 33)
    assert torch.equal(gradient(ids, weight, prompt, ones), torch.full_like(prompt, 5))
    strided = prompt.t().contiguous().t()
    assert torch.equal(gradient(ids, weight, strided, dout), expected)


def test_nothing_of_the_vocabularys_size(backend, device):
    V, D = 30000, 16
    weight = torch.nn.Parameter(torch.randn(V, D, device=device), requires_grad=False)
    prompt = torch.randn(4, D, device=device, requires_grad=True)
    input_ids = torch.randint(V, (2, 3), device=device)
    with saved_bytes() as saved:
        out = prompt_embed(input_ids, weight, prompt, dropout_p=0.1)
    assert saved.bytes <= prompt.numel() * 4 + 8  # the seed, and the prompts for their shape
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        out.sum().backward()
    assert weight.grad is None
    largest = max(max(event.cpu_memory_usage, event.device_memory_usage) for event in profile.events())
    assert 0 < largest < weight.numel() * 4 / 10


def test_saves_nothing_for_a_frozen_prompt(backend, device):
    weight, prompt = torch.randn(9, 5, device=device), torch.randn(4, 5, device=device)
    with saved_bytes() as saved:
        out = prompt_embed(torch.zeros(2, 3, dtype=torch.int64, device=device), weight, prompt)
    assert saved.bytes == 0
    assert not out.requires_grad


def test_derivative_of_the_reference():
    weight, ids = torch.randn(9, 4, dtype=torch.float64), torch.randint(9, (5, 2))
    prompts = [torch.randn(n, 4, dtype=torch.float64, requires_grad=True) for n in (3, 1)]
    options = {"dropout_p": 0.3, "seed": torch.tensor([3])}

    def padded(*prompts):
        return prompt_embed(ids, weight, prompts, [1, 0, 0, 1, 0], **options)

    def packed(*prompts):
        ends = torch.arange(0, 11, 2)
        return prompt_embed(ids.reshape(-1), weight, prompts, [1, 0, 0, 1, 0], cu_seqlens=ends, **options)[0]

    assert torch.autograd.gradcheck(padded, prompts)
    assert torch.autograd.gradcheck(packed, prompts)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(200, 2, 77), (3, 4, 1100)], ids=str)
def test_the_same_bits_of_more_than_is_summed_at_a_time(backend, device, shape, dtype, p):
    """Of more sequences, whose sum remembers what rounding took from its last part, and of longer rows."""
    dout, prompts = random_rows(shape, dtype, device), torch.empty(2, shape[-1], dtype=dtype, device=device)
    arguments = (dout, prompts, None, None, None, torch.tensor([77], device=device), p)
    expected = prompt_embed_backward_reference(*arguments)
    assert torch.equal(torch.ops.fastprompt.prompt_embed_backward(*arguments), expected)

# SPDX-License-Identifier: Apache-2.0
"""Offsets past 2^31 elements, in memory of which only the touched pages exist. Of each launch the last program alone
runs: two million of them would take the interpreter an hour."""

import math
import mmap
import sys

import numpy as np
import pytest
import torch
from fastprompt.triton_kernels import linear_cross_entropy as loss_kernels
from fastprompt.triton_kernels import prompt_embed as embed_kernels
from fastprompt.triton_kernels import rms_norm as norm_kernels
from fastprompt.triton_kernels._elements import launch_elements
from fastprompt.triton_kernels.dropout_add import dropout_add_kernel
from fastprompt.triton_kernels.relu_dropout import relu_dropout_backward_kernel, relu_dropout_kernel
from fastprompt.triton_kernels.t5_attention import t5_attention
from fastprompt.triton_kernels.t5_attention_backward import t5_attention_backward, t5_attention_rows_kernel
from fastprompt.triton_kernels.t5_attention_prompt_sum import t5_attention_prompt_sum
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

from fastprompt.ops import _dropout
from fastprompt.ops import _t5_attention_reference as reference

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's lazily committed memory")
NORESERVE = 0x4000  # Linux; Python names it from 3.14 on
THRESHOLD = 2**15


def sparse(*shape, dtype=torch.bfloat16):
    """Zeros; the memory of a page appears when it is touched."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE
    memory = mmap.mmap(-1, torch.Size(shape).numel() * dtype.itemsize, flags=flags)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


@pytest.fixture(autouse=True)
def _on_a_cpu(device):
    if device.type != "cpu":
        pytest.skip("in memory of which only the touched pages exist")


@pytest.fixture
def last_programs(monkeypatch):
    """Of a launch's first axis the last program alone runs."""
    skipped, begin, number = [0], GridExecutor.__init__, InterpreterBuilder.create_get_program_id

    def begin_with_one(self, function, names, grid, *rest, **options):
        skipped[0] = grid[0] - 1
        begin(self, function, names, (1, *grid[1:]), *rest, **options)

    def moved(self, axis):
        found = number(self, axis)
        found.data += np.int32(0 if axis else skipped[0])
        return found

    monkeypatch.setattr(GridExecutor, "__init__", begin_with_one)
    monkeypatch.setattr(InterpreterBuilder, "create_get_program_id", moved)


def keeps(seed, first):
    """Which of the eight elements from ``first`` on dropout keeps."""
    return _dropout.half_words(_dropout.philox(seed, torch.tensor([first // 8])))[0] >= THRESHOLD


def test_elements(last_programs):
    N, seed = 2**31 + 8, torch.tensor([7])
    x, h = sparse(N), sparse(N)
    x[-8:] = torch.arange(1.0, 9.0)
    launch_elements(dropout_add_kernel, x, x, None, seed, h, 2.0, THRESHOLD)
    assert torch.equal(h[-8:], torch.where(keeps(seed, N - 8), 2 * x[-8:], 0.0))


def test_bits_of_elements(last_programs):
    N, seed = 2**34 + 8, torch.tensor([7])
    x, y, kept = sparse(N), sparse(N), sparse(N // 8, dtype=torch.uint8)
    x[-8:] = torch.arange(1.0, 9.0)
    launch_elements(relu_dropout_kernel, x, x, seed, y, kept, 2.0, THRESHOLD)
    expected = keeps(seed, N - 8)
    assert torch.equal(y[-8:] > 0, expected)
    assert torch.equal((kept[-1] >> torch.arange(8)) & 1, expected.to(torch.uint8))
    dx = sparse(N)
    launch_elements(relu_dropout_backward_kernel, x, x, kept, dx, 2.0)
    assert torch.equal(dx[-8:], y[-8:])


def test_rms_norm(last_programs):
    N, D = 2**27 + 3, 16
    x, y, rstd, w = sparse(N, D), sparse(N, D), sparse(N, dtype=torch.float32), torch.ones(D).bfloat16()
    x[-3:] = torch.randn(3, D)
    norm_kernels._forward(x, None, w, None, None, y, rstd, 1e-6, 0.0)
    few, few_rstd = norm_kernels.rms_norm(x[-3:], w, 1e-6)
    assert torch.equal(y[-3:], few)
    assert torch.equal(rstd[-3:], few_rstd)
    dx = sparse(N, D)
    norm_kernels._backward(y, None, x, w, rstd, None, dx, None, 0.0)
    assert torch.equal(dx[-3:], norm_kernels.rms_norm_backward(few, x[-3:], w, few_rstd))


def test_linear_cross_entropy(last_programs):
    C, D, found = 2048, 2048, []
    row, others_row, weight = torch.randn(C), torch.rand(D), torch.randn(8, D).bfloat16()
    for N in (2**20 + 1, 1):
        logits, labels = sparse(N, C), sparse(N, dtype=torch.int64)
        others, drows = sparse(N, D, dtype=torch.float32), sparse(N, D)
        top, total, picked, losses = (sparse(N, dtype=torch.float32) for _ in range(4))
        logits[-1], labels[-1], others[-1] = row, 5, others_row
        statistics = top, total, picked, others
        loss_kernels.linear_cross_entropy(logits, labels, *statistics, 1, True)
        loss_kernels.linear_cross_entropy_rows(labels, *statistics, weight, D, 0, 8, -100, losses, drows)
        found.append([x[-1].clone() for x in (logits, *statistics, losses, drows)])
    assert all(x.any() for x in found[0])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("packed", [False, True])
def test_prompt_embed(last_programs, packed):
    N, D, R, V = 2**27 + 3, 16, 2, 5
    ids, weight, prompts = (
        sparse(N - R, dtype=torch.int64),
        torch.randn(V, D).bfloat16(),
        torch.randn(R, D).bfloat16(),
    )
    ids[-3:] = torch.tensor([4, 2, 3])
    out = sparse(N, D)
    ends = (torch.tensor([0, N - R]), torch.tensor([0, N])) if packed else (None, None)
    given = (ids, out) if packed else (ids[None], out[None])
    embed_kernels.prompt_embed(given[0], weight, prompts, None, None, *ends, None, given[1], None, 0.0)
    assert torch.equal(out[-3:], weight[ids[-3:]])


def test_gradient_of_a_large_bank(last_programs):
    R, D = 2**27 + 1, 16
    dprompts, dout = sparse(R, D), torch.randn(1, 2, D).bfloat16()
    embed_kernels.prompt_embed_backward(
        dout, torch.tensor([R - 1]), torch.tensor([1]), None, None, dprompts, 1, 2, 0.0
    )
    assert torch.equal(dprompts[-1], dout[0, 0])


def arguments(B, T, S, H, P=0):
    """q, k and v, of all examples the same; with one prompt, where P is not 0."""
    q, k, v = (torch.randn(1, n, H, 16).bfloat16().expand(B, -1, -1, -1) for n in (T, S, S))
    prompts = [torch.randn(1, P, H, 16).bfloat16() for _ in "kv"] if P else [None, None]
    return reference.Inputs(q, k, v, None, *prompts)


def test_attention_of_many_examples(last_programs):
    """Its rows, its statistics and its mask."""
    B, S, H = 2**27 + 1, 16, 17
    a = arguments(B, 1, S, H)
    mask = sparse(B, S, dtype=torch.bool)
    mask[-1, ::2] = True
    out, stats = sparse(B, 1, H, 16), sparse(2, H, B, dtype=torch.float32)
    t5_attention(a._replace(key_mask=mask), out, stats)
    few = a._replace(q=a.q[-1:], k=a.k[-1:], v=a.v[-1:], key_mask=mask[-1:])
    few_out, few_stats = torch.empty(1, 1, H, 16).bfloat16(), torch.empty(2, H, 1)
    t5_attention(few, few_out, few_stats)
    assert few_out.all()
    assert torch.equal(out[-1:], few_out)
    assert torch.equal(stats[:, :, -1:], few_stats)


def test_attentions_gradients_of_many_examples(last_programs):
    """Their shares of the prompts' gradients have more elements than all else."""
    B, P = 2**23 + 1, 16
    a = arguments(B, 1, 1, 1, P)
    few = a._replace(q=a.q[-1:], k=a.k[-1:], v=a.v[-1:])
    found = []
    for each, size in ((a, B), (few, 1)):
        out, stats = sparse(size, 1, 1, 16), sparse(2, 1, size, dtype=torch.float32)
        t5_attention(each, out, stats)
        gradients = [sparse(size, 1, 1, 16) for _ in "qkv"]
        gradients += [sparse(size, P, 1, 16, dtype=torch.float32) for _ in "kv"]
        dout = sparse(size, 1, 1, 16)
        dout[-1:] = 1.0
        t5_attention_backward(dout, out, stats, each, *gradients)
        found.append([x[-1:].clone() for x in gradients])
    assert all(x.any() for x in found[0][2:])
    assert all(map(torch.equal, *found))


def test_rows_of_many_examples(last_programs):
    N, H = 2**27 + 1, 17
    dout, stats = sparse(N, H, 16), sparse(2, H, N, dtype=torch.float32)
    rows = sparse(3, H, N, dtype=torch.float32)
    dout[-1], stats[0, 0, -1], stats[1, 0, -1] = 2.0, 3.0, 2.0
    t5_attention_rows_kernel[(2**22 + 1, 1)](dout, dout, stats, rows, N, H=H, K=16, BM=32)
    assert rows[:, 0, -1].tolist() == pytest.approx([64.0, 3.0 / math.log(2.0) + 1.0, 0.5])


def test_prompt_sum(last_programs):
    B, R, P, H = 3, 3, 2**10, 2**16
    share = sparse(B, P, H, 16, dtype=torch.float32)
    share[:, -1, -1] = torch.randn(3, 16)
    total = sparse(R, P, H, 16, dtype=torch.float32)
    t5_attention_prompt_sum(share, torch.tensor([2, 2, 2]), total)
    assert torch.equal(total[2, -1, -1], (share[0, -1, -1] + share[1, -1, -1]) + share[2, -1, -1])


@pytest.mark.parametrize("dim", range(3))
def test_strides_of_attention(dim):
    """From the first example, row or head to the last are 2^31 elements."""

    def far(x):
        strides = list(x.stride())
        strides[dim] = 2**31 // (x.shape[dim] - 1)
        size = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, strides, strict=True))
        return sparse(size, dtype=x.dtype).as_strided(x.shape, strides).copy_(x)

    a = reference.Inputs(
        *(torch.randn(3 if dim == 0 else 1, 5, 3, 16) for _ in "qkv"), None,
        *(torch.randn(3, 5, 3, 16) for _ in "kv"),
    )  # fmt: skip
    a = a._replace(prompt_ids=torch.tensor([2, 0, 1])[: len(a.q)])
    found = []
    for each in (
        a,
        a._replace(**{name: far(getattr(a, name)) for name in ("q", "k", "v", "prompt_k", "prompt_v")}),
    ):
        out, stats = torch.empty(a.q.shape), torch.empty(2, 3, a.q.shape[0] * 5)
        t5_attention(each, out, stats)
        gradients = [torch.empty(a.q.shape) for _ in "qkv"] + [torch.empty(len(a.q), 5, 3, 16) for _ in "kv"]
        t5_attention_backward(torch.ones_like(out), out, stats, each, *gradients)
        found.append((out, stats, *gradients))
    assert all(map(torch.equal, *found))

# SPDX-License-Identifier: Apache-2.0
"""Offsets past 2^31 elements, in virtual memory of which only the touched pages exist.

prompt_embed jumps to rows of a table, so a table of 2^32 elements costs nothing to test. rms_norm reads every element
that it is given: at such a size, only its shapes are tested.
"""

import mmap
import sys

import pytest
import torch

from fastprompt.ops import prompt_embed, rms_norm

OP = "prompt_embed"
MAP_NORESERVE = 0x4000  # Linux; Python names it from 3.14 on

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's lazily committed memory")


def sparse_table(rows, D, device):
    """[rows, D] bfloat16 zeros; on a CPU, the memory of a page appears when it is touched."""
    if device.type != "cpu":
        return torch.zeros(rows, D, dtype=torch.bfloat16, device=device)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    memory = mmap.mmap(-1, rows * D * 2, flags=flags)
    return torch.frombuffer(memory, dtype=torch.bfloat16).view(rows, D)


@pytest.fixture
def far(device):
    """A table in which the last row's offset needs more than 32 bits, unsigned, even in elements."""
    D = 129
    table = sparse_table(2**32 // D + 7, D, device)
    table[-3:] = torch.randn(3, D).bfloat16()
    return table


def test_tokens_at_the_far_end_of_the_vocabulary(backend, device, far):
    V, D = far.shape
    ids = torch.tensor([[V - 1, 0, V - 3], [V - 2, V - 1, 1]], device=device)
    out = prompt_embed(ids, far, torch.ones(2, D, device=device).bfloat16())
    assert torch.equal(out[:, 2:], far[ids])


def test_prompts_at_the_far_end_of_a_bank(backend, device, far):
    R = len(far)
    starts, lens = torch.tensor([[R - 2, R - 3], [2, 3]], device=device)
    ids, weight = torch.zeros(2, 1, dtype=torch.int64, device=device), far[:1]
    out = torch.ops.fastprompt.prompt_embed(ids, weight, far, starts, lens, None, None, None, 4, 0.0)
    assert torch.equal(out[0, :2], far[-2:])
    assert torch.equal(out[1, :3], far[-3:])


def test_shapes_past_two_to_the_31():
    x = torch.empty(2**21, 2**12, device="meta", dtype=torch.bfloat16, requires_grad=True)
    w = torch.empty(2**12, device="meta", dtype=torch.bfloat16)
    y, h = rms_norm(x, w, residual=x)
    (y + h).sum().backward()
    assert y.shape == h.shape == x.grad.shape == x.shape
    ids, weight = torch.empty(2**12, 2**8, device="meta", dtype=torch.int64), w.expand(2**20, 2**12)
    prompt = torch.empty(100, 2**12, device="meta", dtype=torch.bfloat16, requires_grad=True)
    out = prompt_embed(ids, weight, prompt)
    out.sum().backward()
    assert out.shape == (2**12, 2**8 + 100, 2**12)
    assert prompt.grad.shape == prompt.shape

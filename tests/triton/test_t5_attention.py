# SPDX-License-Identifier: Apache-2.0
"""t5_attention in Triton, beyond tests/ops: what only a GPU's index data can hold, and the tiles of packed calls."""

import pytest
import torch
from fastprompt.triton_kernels import t5_attention as kernels

from fastprompt import ops, use_backend
from fastprompt.ops import _t5_attention_reference as reference


def inputs(device, **changed):
    q, k, v = (torch.randn(2, n, 2, 16, device=device) for n in (5, 7, 7))
    prompts = [torch.randn(3, 4, 2, 16, device=device) for _ in "kv"]
    ids = torch.tensor([2, 0], device=device)
    a = reference.Inputs(q, k, v, None, *prompts, ids, None, None, None, None, None, None, 0, False, 0.0)
    return a._replace(**changed)


def forward(a):
    out, stats = torch.empty_like(a.q), a.q.new_empty(2, a.q.shape[-2], a.q.numel() // 32)
    kernels.t5_attention(a, out, stats)
    return out, stats


@pytest.mark.parametrize("bad", [-1, 3, 2**40, -(2**62)])
def test_an_unknown_prompt_gives_nan_and_reads_nothing(device, bad):
    """On a GPU nobody looks at the ids before; the interpreter checks every address."""
    a = inputs(device, prompt_ids=torch.tensor([bad, 1], device=device))
    out, stats = forward(a)
    assert out[0].isnan().all()
    expected, _ = reference.forward(a._replace(prompt_ids=torch.tensor([1, 1], device=device)))
    torch.testing.assert_close(out[1], expected[1])
    gradients = kernels_backward(a, out, stats)
    assert gradients[0][0].isnan().all()
    assert all(x[1].isfinite().all() for x in gradients[:3])


@pytest.mark.parametrize("lens", [[9, 4, 4], [-5, 2**40, 4]])
def test_lengths_are_clamped(device, lens):
    a = inputs(device, prompt_lens=torch.tensor(lens, device=device))
    clamped = a._replace(prompt_lens=a.prompt_lens.clamp(0, 4))
    torch.testing.assert_close(forward(a)[0], reference.forward(clamped)[0])


def kernels_backward(a, out, stats):
    gradients = [torch.empty_like(x) for x in (a.q, a.k, a.v)]
    gradients += [a.q.new_empty(2, 4, 2, 16) for _ in "kv"]
    kernels.t5_attention_backward(torch.ones_like(out), out, stats, a, *gradients)
    return gradients


def test_a_prompts_own_length_bounds_its_gradient(device):
    """Rows past a prompt's length are written, as zeros."""
    a = inputs(device, prompt_lens=torch.tensor([1, 2, 3], device=device))
    share_k, share_v = kernels_backward(a, *forward(a))[3:]
    for share in (share_k, share_v):
        assert not share[0, 3:].any()
        assert not share[1, 1:].any()
        assert share[0, :3].any()


@pytest.mark.parametrize("lengths", [[0, 0, 40], [16, 16, 8], [1, 38, 1], [40, 0, 0]])
def test_every_packed_row_finds_its_example(device, lengths):
    """Empty examples first, last and between, and tiles that end with their example."""
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], device=device)
    q = torch.randn(40, 2, 16, device=device)
    with use_backend("t5_attention", "triton"):
        out = ops.t5_attention(q, q, q, cu_q=cu, cu_k=cu, causal=True)
    for begin, end in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        if end > begin:
            x = q[None, begin:end]
            torch.testing.assert_close(out[None, begin:end], ops.t5_attention(x, x, x, causal=True))

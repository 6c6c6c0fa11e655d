# SPDX-License-Identifier: Apache-2.0
"""t5_attention on packed examples gives what it gives on padded ones."""

import pytest
import torch
from attention_case import MARKS, Case, run

OP = "t5_attention"
pytestmark = MARKS


@pytest.fixture(autouse=True)
def _not_in_cuda(request):
    """On a GPU packed rows are Triton's alone. Asked before ``backend`` is, which would wait for a call in vain."""
    if request.node.callspec.params["backend"] in ("cuda", "emulated"):
        pytest.skip("CUDA C++ refuses packed rows")


def packed(x, lengths):
    return torch.cat([row[:n] for row, n in zip(x, lengths, strict=True)])


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_packed_equals_padded(backend, device, p, T):
    """Outputs and gradients of the real rows, dropout included; an example without tokens too."""
    queries, keys = [T, 0, 2], [9, 5, 2]
    mask = torch.arange(9, device=device)[None] < torch.tensor(keys, device=device)[:, None]
    padded = Case(device, B=3, T=T, S=9, P=4, dropout_p=p, causal=True, offset=2)
    real = torch.arange(T, device=device)[None] < torch.tensor(queries, device=device)[:, None]
    padded.dout = padded.dout * real[..., None, None]
    expected = run(padded, key_mask=mask)
    case = Case(device, B=3, T=T, S=9, P=4, dropout_p=p, causal=True, offset=2)
    q, k, v, *prompts = case.tensors
    case.tensors = [packed(q, queries), packed(k, keys), packed(v, keys), *prompts]
    case.dout = packed(padded.dout, queries)
    cu = [torch.tensor([0, *torch.tensor(n).cumsum(0)], device=device) for n in (queries, keys)]
    for cu_q, cu_k in ((cu[0], cu[1]), (cu[0].int(), cu[1].int())):
        out, dq, dk, dv, *dprompts = run(case, cu_q=cu_q, cu_k=cu_k)
        for value, other, lengths in zip(
            (out, dq, dk, dv), expected, (queries, queries, keys, keys), strict=False
        ):
            torch.testing.assert_close(value, packed(other, lengths), rtol=1e-5, atol=1e-6)
        for value, other in zip(dprompts, expected[4:], strict=True):
            torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-6)


def test_an_example_without_queries_behind_a_long_one(backend, device, slow):
    """Packed, it adds nothing and is in nobody's way."""
    T = 20 if slow else 130
    case = Case(device, torch.bfloat16, B=1, T=T, S=40)
    case.tensors, case.dout = [x[0] for x in case.tensors], case.dout[0]
    cu_q, cu_k = torch.tensor([[0, T, T, T], [0, 30, 35, 40]], device=device)
    out, dq, dk, dv = run(case, cu_q=cu_q, cu_k=cu_k)
    case.tensors[1:] = [x[:30] for x in case.tensors[1:]]
    alone = run(case, cu_q=cu_q[:2], cu_k=cu_k[:2])
    assert all(map(torch.equal, (out, dq, dk[:30], dv[:30]), alone))
    assert not dk[30:].any()
    assert not dv[30:].any()

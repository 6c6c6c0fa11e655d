# SPDX-License-Identifier: Apache-2.0
"""t5_attention's gradients: of which outputs, for which inputs, and what is saved for them."""

import pytest
import torch
from attention_case import FLOATS, MARKS, Case, assert_finite_where_hf_is, key_mask, queries, run

from fastprompt import backends, use_backend
from fastprompt._native import CPU_TARGETS
from fastprompt.ops import t5_attention
from fastprompt.testing import saved_bytes

OP = "t5_attention"
pytestmark = MARKS


@pytest.mark.parametrize("T", [3, 9, 90])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_outputs_that_nothing_reads(backend, device, slow, T, p):
    """Their gradients are zero, as a model's are at padding; what is not finite spreads there all the same."""
    T = min(T, 12) if slow else T
    case = Case(device, B=4, T=T, S=T, P=3, dropout_p=p)
    case.dout[0, -(T // 2) :] = 0.0
    case.dout[1, : T // 2] = 0.0
    case.dout[2, [0, T - 1]] = 0.0
    case.dout[3] = 0.0
    case.check()
    for x, value in ((case.q, "nan"), (case.k, "-inf"), (case.v, "nan"), (case.v, "inf")):
        kept = x[1, 0, 1, 3].clone()
        x[1, 0, 1, 3] = float(value)
        assert_finite_where_hf_is(case)
        x[1, 0, 1, 3] = kept


def test_gradients_of_any_strides(backend, device):
    """What comes back from a sum is one number, expanded."""
    case = Case(device, T=5, S=6)
    case.dout = torch.ones((), device=device).expand_as(case.dout)
    expected = run(case)
    case.dout = case.dout.contiguous()
    assert all(map(torch.equal, run(case), expected))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_shares_of_a_prompts_gradient_are_added_in_order_and_rounded_once(backend, device, dtype):
    """More examples and columns than a kernel takes at once."""
    B, R = 37, 3
    share = torch.randn(B, 5, 4, 16, device=device)
    ids = torch.randint(R, (B,), generator=torch.Generator().manual_seed(0)).to(device)
    expected = torch.zeros(R, 5, 4, 16, device=device)
    for b, r in enumerate(ids.tolist()):
        expected[r] += share[b]
    found = torch.ops.fastprompt.t5_attention_prompt_sum(share, ids, R, dtype)
    assert torch.equal(found, expected.to(dtype))


def test_what_is_saved(backend, device):
    """q, k, v, two numbers per row and head, and but for a CPU's kernel out: nothing of size T x S, and nothing without
    gradients.
    """
    case = Case(device, T=12, S=40, H=2, K=16, P=8, dropout_p=0.1, key_mask=key_mask("right", 2, 40, device))
    leaves = [x.requires_grad_() for x in case.tensors]
    out = [] if backend.startswith("cpu") else [leaves[0]]
    small = sum(x.numel() * x.element_size() for x in (*leaves, *out, case.bias, case.options["key_mask"]))
    with saved_bytes() as saved:
        case.ours(*leaves)
    assert saved.bytes <= small + 2 * 4 * 2 * 12 * 2 + 64
    with saved_bytes() as saved, torch.no_grad():
        case.ours(*leaves)
    assert saved.bytes == 0


@pytest.mark.skipif(not CPU_TARGETS, reason="needs the compiled extension")
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("T", [5, 40])
def test_what_the_cpu_saves_is_enough_for_every_backend(dropout_p, T):
    """A pass forward on the CPU's kernel keeps no output; the pass backward may run under another backend."""
    device = torch.device("cpu")
    case = Case(device, T=T, S=7, P=3, dropout_p=dropout_p, key_mask=key_mask("left", 2, 7, device))
    leaves = [x.requires_grad_() for x in case.tensors]

    def gradients(backend):
        out = case.ours(*leaves)
        with use_backend(OP, backend):
            return torch.autograd.grad(out.square().sum(), leaves)

    expected = gradients("cpu")
    for backend in backends(OP):
        for ours, theirs in zip(gradients(backend), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.falls_back("t5_attention_backward")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("inside", ["forward", "backward"])
def test_autocast_changes_nothing(backend, device, dtype, inside):
    """Neither in the pass that it surrounds nor in the reference's backward pass of a kernel's forward pass."""
    case = Case(device, dtype, B=2, T=queries(backend, 20), S=30, K=64)
    leaves = [x.requires_grad_() for x in case.tensors]

    def autocast(where):
        return torch.autocast(device.type, torch.bfloat16, enabled=inside == where)

    with autocast("forward"):
        out = case.ours(*leaves)
    with use_backend(OP, "reference"), autocast("backward"):
        found = torch.autograd.grad(out, leaves, case.dout)
    again = case.ours(*leaves)
    assert torch.equal(out, again)
    with use_backend(OP, "reference"):
        expected = torch.autograd.grad(again, leaves, case.dout)
    for one, two in zip(found, expected, strict=True):
        assert torch.equal(one, two)


def test_the_references_gradient_is_of_its_own_scores(device):
    """Another backend's statistics, of scores that TF32 or bfloat16 rounded, do not tell its weights."""
    case = Case(device, K=64)
    op = torch.ops.fastprompt
    a = [*case.tensors, case.bias, *[None] * 9, 0, False, 0.0]
    with use_backend(OP, "reference"):
        out, stats = op.t5_attention(*a)
        expected = op.t5_attention_backward(case.dout, out, stats, *a)
        found = op.t5_attention_backward(case.dout, out, stats * 1.01, *a)
    for one, two in zip(found, expected, strict=True):
        assert torch.equal(one, two)


def test_only_what_needs_a_gradient_gets_one(backend, device):
    case = Case(device, P=3)
    q, k, v, prompt_k, prompt_v = case.tensors
    t5_attention(
        q, k, v, case.bias, prompt_k=prompt_k, prompt_v=prompt_v.requires_grad_(), **case.options
    ).sum().backward()
    assert prompt_v.grad is not None
    assert all(x.grad is None for x in (q, k, v, prompt_k))

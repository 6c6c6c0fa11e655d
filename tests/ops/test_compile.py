# SPDX-License-Identifier: Apache-2.0
"""What torch's compiler needs of the ops: right schemas, right fakes, no graph breaks, equal results."""

import pytest
import torch
from torch.autograd import forward_ad

from fastprompt import use_backend
from fastprompt._op import OPS
from fastprompt.ops import prompt_embed, rms_norm

SEED = torch.tensor([5])


def leaf(*shape):
    return torch.randn(*shape, requires_grad=True)


def transposed(*shape):
    return torch.randn(*shape[::-1]).t().requires_grad_()


def norm_samples():
    w = torch.randn(6)
    for x in (leaf(3, 6), transposed(3, 6)):
        y, rstd = x.detach(), torch.rand(3)
        yield "rms_norm", (x, w, 1e-6)
        yield "rms_norm_backward", (y, y, w, rstd)
        yield "rms_norm_residual", (x, y, w, SEED, 1e-6, 0.5)
        yield "rms_norm_residual_backward", (y, y, y, w, rstd, SEED, 0.5, torch.float32, torch.float32)
    yield "rms_norm_residual_backward", (y, None, y, w, rstd, None, 0.0, torch.float32, torch.float32)
    yield "rms_norm", (leaf(2, 0, 6).half(), w.bfloat16(), 1e-6)
    yield "rms_norm_residual", (leaf(3, 6).half(), leaf(3, 6), w.half(), None, 1e-6, 0.0)


def embed_samples():
    ids, weight = torch.randint(9, (2, 3)), torch.randn(9, 4)
    starts, lens = torch.tensor([0, 2]), torch.tensor([2, 5])
    cu_tokens, cu_rows = torch.tensor([0, 1, 6]), torch.tensor([0, 3, 13])
    for prompts in (leaf(7, 4), transposed(7, 4)):
        yield "prompt_embed", (ids, weight, prompts, starts, lens, None, None, SEED, 8, 0.5)
        yield "prompt_embed_backward", (torch.randn(2, 8, 4), prompts.detach(), starts, lens, None, SEED, 0.5)
    yield "prompt_embed", (ids.int(), weight.bfloat16(), prompts, None, None, None, None, None, 10, 0.0)
    yield "prompt_embed", (ids.view(6), weight, prompts, starts, lens, cu_tokens, cu_rows, None, 13, 0.0)
    yield "prompt_embed_backward", (torch.randn(13, 4), prompts.detach(), starts, lens, cu_rows, None, 0.0)


def attention_samples():
    B, T, S, H, K, P = 2, 3, 4, 2, 16, 5
    bias, ids, lens = torch.randn(H, 9), torch.tensor([1, 0]), torch.tensor([5, 3])
    mask, offsets = torch.tensor([[True, True, False, True]] * B), torch.tensor([1, 0])
    cu_q, cu_k = torch.tensor([0, 1, 6]), torch.tensor([0, 3, 8])
    out, share = torch.randn(B, T, H, K), torch.randn(B, P, H, K)
    q, k = leaf(B, T, H, K), leaf(B, H, S, K).transpose(1, 2)
    prompt, nothing = leaf(2, P, H, K), (None,) * 6
    for arguments in (
        (q, k, k, bias, prompt, prompt, ids, lens, mask, offsets, None, None, SEED, 0, True, 0.5),
        (q, k, k, None, *nothing, None, None, None, 2, False, 0.0),
        (q.flatten(0, 1), k.flatten(0, 1), k.flatten(0, 1), bias, *nothing, cu_q, cu_k, None, 0, True, 0.0),
    ):
        yield "t5_attention", arguments
        detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
        y, stats = torch.ops.fastprompt.t5_attention(*detached)
        yield "t5_attention_backward", (out.view(y.shape), y, stats, *detached)
    for dtype in (torch.float32, torch.bfloat16):
        yield "t5_attention_prompt_sum", (share, ids, 2, dtype)


def element_samples(name, *options):
    """Of an op on a and b with a mask from the seed, and of its backward."""
    for a, b in ((leaf(2, 3, 8), leaf(2, 3, 8)), (transposed(6, 8), transposed(6, 8))):
        for seed, p in ((SEED, 0.5), (None, 0.0)):
            yield name, (a, b, seed, *options, p)
            yield f"{name}_backward", (torch.randn(a.shape), a.detach(), b.detach(), seed, *options, p)


def gated_samples():
    for act in ("gelu_new", "gelu", "silu"):
        yield from element_samples("gated_act", act)


def relu_samples():
    for a in (leaf(2, 3, 8), transposed(6, 8)):
        yield "relu_dropout", (a, SEED, 0.5)
        _, bits = torch.ops.fastprompt.relu_dropout(a.detach(), SEED, 0.5)
        yield "relu_dropout_backward", (torch.randn(a.shape), bits, 0.5)


def linear_samples():
    for x, weight in ((leaf(2, 16, 40), torch.randn(33, 40)), (transposed(3, 6), torch.randn(6, 4).t())):
        yield "frozen_linear", (x, weight)
        dy = torch.randn(*x.shape[:-1], len(weight))
        yield "frozen_linear_backward", ([dy, dy], [weight, weight])
    yield "frozen_linear", (leaf(0, 4).bfloat16(), torch.randn(3, 4).bfloat16())


def dropout_samples():
    for x, residual in ((leaf(2, 3, 8), leaf(2, 3, 8)), (transposed(6, 8), None)):
        yield "dropout_add", (x, residual, SEED, 0.5)
    yield "dropout_add", (x, x.detach(), None, 0.0)


def loss_samples():
    labels, weight = torch.tensor([[3, -100, 8], [0, 1, 2]]), torch.randn(9, 4)
    for hidden in (leaf(2, 3, 4), leaf(3, 2, 4).transpose(0, 1)):
        yield "linear_cross_entropy", (hidden, weight, labels, None, 1.0, -100, 2, True)
    yield "linear_cross_entropy", (hidden.detach(), weight, labels, torch.tensor(7), 0.5, -100, None, False)
    yield (
        "linear_cross_entropy",
        (leaf(0, 4).bfloat16(), weight.bfloat16(), labels[0, :0], None, 1.0, 3, None, True),
    )


SAMPLES = {
    "rms_norm": norm_samples,
    "prompt_embed": embed_samples,
    "t5_attention": attention_samples,
    "frozen_linear": linear_samples,
    "gated_act": gated_samples,
    "relu_dropout": relu_samples,
    "dropout_add": dropout_samples,
    "linear_cross_entropy": loss_samples,
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("which", ["default", "reference"])
@pytest.mark.parametrize("name", sorted(OPS))
def test_opcheck(name, which):
    tested, checks = set(), ["test_schema", "test_faketensor"]
    if which == "default":  # what follows does not depend on the backend
        checks += ["test_autograd_registration", "test_aot_dispatch_dynamic"]
    with use_backend(name, OPS[name].backends()[0] if which == "default" else which):
        for member, arguments in SAMPLES[name]():
            op = getattr(torch.ops.fastprompt, member).default
            torch.library.opcheck(op, arguments, test_utils=checks)
            tested.add(member)
    assert tested == set(OPS[name].members), "every schema needs a sample"


@pytest.mark.parametrize("name", sorted(OPS))
def test_a_second_derivative_is_refused(name):
    """The backwards have no gradient of their own: what they return would pass for a constant."""
    member, arguments = next(iter(SAMPLES[name]()))
    leaves = [x for x in arguments if isinstance(x, torch.Tensor) and x.requires_grad]
    result = getattr(torch.ops.fastprompt, member)(*arguments)
    loss = (result if isinstance(result, torch.Tensor) else result[0]).sum()
    with pytest.raises(RuntimeError, match=f"^fastprompt::{member}: has no second derivative: call backward"):
        torch.autograd.grad(loss, leaves, create_graph=True)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", sorted(OPS))
def test_a_forward_mode_derivative_is_refused(name, grad):
    """It would be left out without a word."""
    member, arguments = next(iter(SAMPLES[name]()))
    place = next(i for i, x in enumerate(arguments) if isinstance(x, torch.Tensor) and x.is_floating_point())
    x = arguments[place].detach().requires_grad_(grad)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(
            NotImplementedError, match=f"^fastprompt::{member}: has no forward-mode derivative"
        ):
            getattr(torch.ops.fastprompt, member)(*arguments[:place], dual, *arguments[place + 1 :])
        getattr(torch.ops.fastprompt, member)(*arguments)  # without tangents


def embed_and_norm(ids, weight, prompt, w, p, seed):
    h = prompt_embed(ids, weight, prompt, dropout_p=p, seed=seed)
    y, h = rms_norm(torch.tanh(h), w, residual=h, dropout_p=p, seed=seed)
    return rms_norm(y + h, w) * 2


def results(function, ids, weight, prompt, w, *options):
    prompt = prompt.detach().requires_grad_()
    y = function(ids, weight, prompt, w, *options)
    y.square().sum().backward()
    return y.detach(), prompt.grad


@pytest.fixture
def inputs():
    return torch.randint(9, (2, 3)), torch.randn(9, 16), torch.randn(4, 16), torch.randn(16)


@pytest.mark.parametrize("compiler", ["inductor", "aot_eager"])
def test_one_graph_with_equal_results(inputs, compiler):
    torch._dynamo.reset()
    compiled = torch.compile(embed_and_norm, fullgraph=True, backend=compiler)
    got, expected = results(compiled, *inputs, 0.2, SEED), results(embed_and_norm, *inputs, 0.2, SEED)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_one_graph_for_all_shapes(inputs):
    torch._dynamo.reset()
    _, weight, prompt, w = inputs
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(embed_and_norm, fullgraph=True, backend=graphs, dynamic=True)
    counts = []
    for B, S in ((2, 3), (5, 4), (3, 7)):
        arguments = (torch.randint(9, (B, S)), weight, prompt, w, 0.2, SEED)
        torch.testing.assert_close(results(compiled, *arguments), results(embed_and_norm, *arguments))
        counts.append(graphs.frame_count)
    assert counts[0] == counts[-1], "compiled again for another shape"


def test_one_graph_with_chosen_prompts_packed(inputs):
    torch._dynamo.reset()
    ids, weight, prompt, _ = inputs

    def packed(ids, weight, prompt, ends):
        rows, cu_rows = prompt_embed(ids, weight, [prompt[:3], prompt], [1, 0], cu_seqlens=ends)
        return rows * 2, cu_rows

    arguments = (ids.reshape(-1), weight, prompt, torch.tensor([0, 2, 6]))
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(*arguments), packed(*arguments), strict=True):
        assert torch.equal(got, expected)


def test_one_graph_with_a_seed_drawn_inside(inputs):
    torch._dynamo.reset()
    compiled = torch.compile(embed_and_norm, fullgraph=True, backend="aot_eager")
    torch.manual_seed(3)
    first, second = (compiled(*inputs, 0.5, None) for _ in range(2))
    assert not torch.equal(first, second)

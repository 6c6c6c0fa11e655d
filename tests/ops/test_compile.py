# SPDX-License-Identifier: Apache-2.0
"""What torch's compiler needs of the ops: right schemas, right fakes, no graph breaks, equal results."""

import pytest
import torch
from samples import SAMPLES, SEED
from torch.autograd import forward_ad

import fastprompt.ops
from fastprompt import use_backend
from fastprompt.dispatch import OPS
from fastprompt.ops import prompt_embed, rms_norm


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
    assert tested == set(OPS[name].schemas), "every schema needs a sample"


@pytest.mark.parametrize("name", sorted(OPS))
def test_a_second_derivative_is_refused(name):
    """The backwards have no gradient of their own: what they return would pass for a constant."""
    member, arguments = next(iter(SAMPLES[name]()))
    leaves = [x for x in arguments if isinstance(x, torch.Tensor) and x.requires_grad]
    result = getattr(torch.ops.fastprompt, member)(*arguments)
    loss = (result if isinstance(result, torch.Tensor) else result[0]).sum()
    with pytest.raises(RuntimeError, match=f"^fastprompt::{member}: has no second derivative: call backward"):
        torch.autograd.grad(loss, leaves, create_graph=True)


def test_several_gradients_at_once_are_refused_where_pytorch_cannot_run_them_in_turn():
    x, weight = torch.ones(2, 8, requires_grad=True), torch.ones(4, 8)
    y = torch.ops.fastprompt.frozen_linear(x, weight)
    with pytest.raises(NotImplementedError, match=r"^fastprompt::frozen_linear_backward: takes one gradient"):
        torch.autograd.grad(y, x, torch.ones(3, 2, 4), is_grads_batched=True)


@pytest.mark.parametrize("name", sorted(OPS))
def test_an_output_that_claims_a_gradient_has_one(name):
    for member, arguments in SAMPLES[name]():
        leaves = [x for x in arguments if isinstance(x, torch.Tensor) and x.requires_grad]
        result = getattr(torch.ops.fastprompt, member)(*arguments)
        for output in (result,) if isinstance(result, torch.Tensor) else result:
            if output.requires_grad:
                gradients = torch.autograd.grad(output.sum(), leaves, allow_unused=True, retain_graph=True)
                assert any(gradient is not None for gradient in gradients), member


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


@pytest.mark.parametrize("name", sorted(OPS))
def test_a_derivative_inside_torch_func_is_refused(name):
    """By a message that says what to do, where PyTorch's tells a user to change this package."""
    member, arguments = next(iter(SAMPLES[name]()))
    place = next(i for i, x in enumerate(arguments) if isinstance(x, torch.Tensor) and x.is_floating_point())

    def total(x):
        result = getattr(torch.ops.fastprompt, member)(*arguments[:place], x, *arguments[place + 1 :])
        return sum(each.sum() for each in ([result] if isinstance(result, torch.Tensor) else result))

    with pytest.raises(
        NotImplementedError, match=f"^fastprompt::{member}: has no derivative inside torch.func"
    ):
        torch.func.grad(total)(arguments[place].detach())


@pytest.mark.parametrize("name", ["dropout_add", "frozen_linear", "gated_act", "relu_dropout"])
def test_one_graph_of_the_function_alone(name):
    """Its samples have the function's arguments by their names."""
    function = getattr(fastprompt.ops, name)
    names = [each.name for each in getattr(torch.ops.fastprompt, name).default._schema.arguments]
    for arguments in [arguments for member, arguments in SAMPLES[name]() if member == name]:
        torch._dynamo.reset()
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        leaves = [x for x in arguments if isinstance(x, torch.Tensor) and x.requires_grad]
        results = []
        for each in (compiled, function):
            y = each(**dict(zip(names, arguments, strict=True)))
            results.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
        assert all(map(torch.equal, *results))


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

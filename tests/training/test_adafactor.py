# SPDX-License-Identifier: Apache-2.0
"""The optimiser of the released recipe: T5X's formulas, whole second moments."""

import copy

import numpy as np
import pytest
import torch
from transformers.optimization import Adafactor as Factored

from fastprompt.testing import assert_within_budget
from fastprompt.training import Adafactor

SHAPE = (6, 40)


def gradients(steps, scale=1.0):
    generator = torch.Generator().manual_seed(1)
    sizes = (1.0, 0.1, 30.0, 1.0, 0.0)  # growing ones are clipped, zeros make no update
    return [scale * sizes[t % 5] * torch.randn(SHAPE, generator=generator) for t in range(steps)]


def run(optimizer, parameter, steps, scale=1.0):
    for gradient in gradients(steps, scale):
        parameter.grad = gradient.reshape(parameter.shape)
        optimizer.step()
    return parameter.detach()


def start(shape=SHAPE):
    values = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).mul(30.0)
    return torch.nn.Parameter(values.reshape(shape))


def truth(steps, lr, weight_decay, steps_before=0, decay=0.8, clip=1.0):
    """In float64, with T5X's names."""
    param, v = start().detach().double().numpy(), np.zeros(SHAPE)
    for step, gradient in enumerate(gradients(steps)):
        grad = gradient.double().numpy()
        decay_rate = 1.0 - (steps_before + step + 1.0) ** -decay
        v = decay_rate * v + (1.0 - decay_rate) * (grad * grad + 1e-30)
        y = grad * v**-0.5
        y /= max(1.0, np.sqrt(np.mean(y * y)) / clip)
        param = (1.0 - weight_decay) * param - lr * y
    return torch.from_numpy(param)


@pytest.mark.parametrize(
    "how", [{}, {"weight_decay": 1e-2}, {"steps_before": 1_100_000}, {"decay": 0.5}, {"clip": 0.25}]
)
def test_it_is_t5xs(how):
    how = {"lr": 0.3, "weight_decay": 0.0, **how}
    parameter = start()
    ours = run(Adafactor([parameter], **how), parameter, 12)
    expected = truth(12, **how)
    assert_within_budget(ours, expected.float(), expected, ulps=12.0, rms_ulps=6.0)  # a rounding per step


def test_transformers_optimizer_does_the_same_where_it_cannot_factor():
    """That is, on the elements in a row, without decay, which it multiplies by the rate."""
    flat, whole = start(-1), start()
    stock = Factored([flat], lr=0.3, scale_parameter=False, relative_step=False, weight_decay=0.0)
    theirs = run(stock, flat, 10).reshape(SHAPE)
    ours = run(Adafactor([whole], lr=0.3, weight_decay=0.0), whole, 10)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-5)


def test_the_scale_of_the_loss_does_not_matter():
    parameter, scaled = start(), start()
    expected = run(Adafactor([parameter]), parameter, 8)
    assert torch.equal(run(Adafactor([scaled]), scaled, 8, scale=1024.0), expected)


def test_decay_is_not_multiplied_by_the_rate():
    parameter = start()
    expected = parameter.detach() * (1.0 - 0.25)
    assert torch.equal(run(Adafactor([parameter], lr=0.0, weight_decay=0.25), parameter, 1), expected)


def test_training_goes_on_from_its_state():
    parameter = start()
    optimizer = Adafactor([parameter])
    run(optimizer, parameter, 3)
    again = torch.nn.Parameter(parameter.detach().clone())
    other = Adafactor([again])
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert torch.equal(run(other, again, 4), run(optimizer, parameter, 4))


def test_what_has_no_gradient_stays():
    used, unused = start(), start()
    optimizer = Adafactor([used, unused])
    run(optimizer, used, 2)
    assert torch.equal(unused, start())


def test_a_row_that_has_had_no_gradient_yet_stays():
    parameter = start()
    optimizer = Adafactor([parameter], weight_decay=0.0)
    parameter.grad = torch.ones(SHAPE)
    parameter.grad[2] = 0.0
    optimizer.step()
    assert torch.equal(parameter[2], start()[2])
    assert parameter.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_of_few_bits_are_refused(dtype):
    with pytest.raises(ValueError, match=f"must be float32 or float64, got {dtype}"):
        Adafactor([torch.nn.Parameter(torch.ones(3, dtype=dtype))])


def test_sparse_gradients_are_refused():
    embedding = torch.nn.Embedding(4, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match=r"a gradient is sparse\. Make the embedding with sparse=False"):
        Adafactor(embedding.parameters()).step()


@pytest.mark.parametrize(
    "given",
    [
        lambda wrong: wrong,
        lambda wrong: [start(), wrong],
        lambda wrong: iter([wrong]),
        lambda wrong: (wrong,),
    ],
    ids=["tensor", "list", "iterator", "tuple"],
)
def test_a_refused_group_is_not_trained(given):
    optimizer = Adafactor([start()])
    wrong = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    wrong.grad = torch.ones_like(wrong)
    with pytest.raises(ValueError, match="must be float32 or float64"):
        optimizer.add_param_group({"params": given(wrong)})
    optimizer.step()
    assert torch.equal(wrong, torch.ones_like(wrong))
    assert len(optimizer.param_groups) == 1


def test_a_group_with_a_number_that_is_none_is_not_there():
    optimizer, later = Adafactor([start()]), start()
    with pytest.raises(TypeError):
        optimizer.add_param_group({"params": [later], "lr": "0.1"})
    optimizer.add_param_group({"params": [later], "lr": 0.1})
    assert len(optimizer.param_groups) == 2


@pytest.mark.parametrize(
    "given", [lambda right: right, lambda right: iter([right])], ids=["tensor", "iterator"]
)
def test_a_group_that_is_added_is_trained(given):
    first, later = start(), start()
    optimizer = Adafactor([first])
    optimizer.add_param_group({"params": given(later), "lr": 0.0, "weight_decay": 0.25})
    assert torch.equal(run(optimizer, later, 1), start().detach() * (1.0 - 0.25))


def test_a_closure_computes_the_loss():
    parameter = start()
    optimizer = Adafactor([parameter])

    def closure():
        optimizer.zero_grad()
        loss = parameter.square().sum()
        loss.backward()
        return loss

    before = closure().item()
    assert optimizer.step(closure).item() == before
    assert closure().item() < before


@pytest.mark.parametrize(
    "wrong",
    [{"lr": -1.0}, {"lr": float("inf")}, {"weight_decay": float("nan")}, {"decay": 0.0}, {"clip": 0.0}],
)
def test_numbers_out_of_range(wrong):
    message = f"Adafactor: {next(iter(wrong))} must be"
    with pytest.raises(ValueError, match=message):
        Adafactor([start()], **wrong)
    optimizer = Adafactor([start()])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [start()], **wrong})
    assert len(optimizer.param_groups) == 1

# SPDX-License-Identifier: Apache-2.0
"""What linear_cross_entropy refuses: the message names op, argument, what was expected and what came."""

import re

import pytest
import torch

from fastprompt.ops import linear_cross_entropy

OP = "linear_cross_entropy"


def case(error, message, **changes):
    return pytest.param(error, message, changes, id=message[:50])


REFUSED = [
    case(TypeError, "hidden must be a torch.Tensor, got list", hidden=[1.0]),
    case(TypeError, "weight must be a torch.Tensor, got NoneType", weight=None),
    case(TypeError, "labels must be a torch.Tensor, got int", labels=1),
    case(TypeError, "hidden must have dtype float32, .*, got int64", hidden=torch.ones(2, 4, dtype=torch.int64)),
    case(TypeError, "weight must have dtype float32, got bfloat16", weight=torch.ones(9, 4).bfloat16()),
    case(TypeError, "labels must have dtype int64, got int32", labels=torch.ones(2, dtype=torch.int32)),
    case(TypeError, "weight must be a dense tensor, got layout torch.sparse_coo", weight=torch.ones(9, 4).to_sparse()),
    case(ValueError, r"hidden must have shape \[..., D\], got a scalar", hidden=torch.ones(())),
    case(ValueError, r"weight must have shape \[V, D\]=\[V, 4\], got \[9, 5\]", weight=torch.ones(9, 5)),
    case(ValueError, r"weight must have shape \[V, D\]=\[V, 4\], got \[4\]", weight=torch.ones(4)),
    case(ValueError, r"weight must have shape \[V, D\]=\[V, 4\], got \[0, 4\]", weight=torch.ones(0, 4)),
    case(ValueError, r"labels must have shape .*=\[2\], got \[3\]", labels=torch.ones(3, dtype=torch.int64)),
    case(ValueError, r"labels must have shape .*=\[2\], got \[2, 1\]", labels=torch.ones(2, 1, dtype=torch.int64)),
    case(ValueError, "weight must be on cpu like hidden, got meta", weight=torch.ones(9, 4, device="meta")),
    case(
        ValueError, "labels must be on cpu like hidden, got meta",
        labels=torch.ones(2, dtype=torch.int64, device="meta"),
    ),
    case(ValueError, "weight must be frozen, got requires_grad=True", weight=torch.ones(9, 4, requires_grad=True)),
    case(ValueError, "num_items must be positive, got 0", num_items=0),
    case(ValueError, "num_items must be positive, got -3", num_items=-3),
    case(TypeError, "num_items must be an int or a torch.Tensor, got float", num_items=2.5),
    case(TypeError, "num_items must have dtype int64, int32, float32, got bool", num_items=torch.tensor(True)),
    case(ValueError, r"num_items must have shape .*=\[\], got \[1\]", num_items=torch.tensor([3])),
    case(ValueError, "num_items must be on cpu like hidden, got meta", num_items=torch.tensor(3, device="meta")),
    case(TypeError, "scale must be a number, got NoneType", scale=None),
    case(ValueError, "chunk must be positive, got 0", chunk=0),
    case(TypeError, "chunk must be an int, got str", chunk="a"),
    case(IndexError, r"labels must lie in \[0, V\)=\[0, 9\), got 9", labels=torch.tensor([2, 9])),
    case(IndexError, r"labels must lie in \[0, V\)=\[0, 9\), got -1", labels=torch.tensor([-1, 2])),
    case(IndexError, "labels must lie .*, got -100", labels=torch.tensor([-100, 2]), ignore_index=-1),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "changes"), REFUSED)
def test_refused_by_name(error, message, changes):
    changes = dict(changes)
    arguments = {"hidden": torch.ones(2, 4), "weight": torch.ones(9, 4), "labels": torch.tensor([3, -100])}
    hidden, weight, labels = (changes.pop(name, value) for name, value in arguments.items())
    with pytest.raises(error, match=f"^fastprompt::linear_cross_entropy: {message}"):
        linear_cross_entropy(hidden, weight, labels, **changes)


def test_a_weight_to_be_trained_is_refused_with_the_remedy():
    hidden, weight, labels = torch.ones(2, 4), torch.ones(9, 4, requires_grad=True), torch.tensor([3, 4])
    with pytest.raises(ValueError, match=re.escape("weight.requires_grad_(False)")):
        linear_cross_entropy(hidden, weight, labels)
    with torch.no_grad():  # nothing would be lost: no gradient is asked for
        linear_cross_entropy(hidden, weight, labels)


def raw(device="cpu", **changes):
    arguments = {
        "hidden": torch.ones(2, 4), "weight": torch.ones(9, 4), "labels": torch.tensor([3, -100]), "num_items": None,
        "scale": 1.0, "ignore_index": -100, "chunk": None, "needs_grad": True,
    }  # fmt: skip
    values = (arguments | changes).values()
    on_device = (value.to(device) if isinstance(value, torch.Tensor) else value for value in values)
    return torch.ops.fastprompt.linear_cross_entropy(*on_device)


def test_the_raw_op_refuses_what_it_cannot_differentiate():
    with pytest.raises(ValueError, match="weight must be frozen"):
        raw(weight=torch.ones(9, 4, requires_grad=True))
    with pytest.raises(ValueError, match="needs_grad must be True where hidden requires grad, got False"):
        raw(hidden=torch.ones(2, 4, requires_grad=True), needs_grad=False)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden": torch.ones(2, 3)},
        {"hidden": torch.ones(3, 4)},
        {"hidden": torch.ones(())},
        {"weight": torch.ones(9)},
        {"weight": torch.ones(9, 4).half()},
        {"weight": torch.ones(0, 4)},
        {"labels": torch.ones(2)},
        {"labels": torch.tensor([3, 4, 5])},
        {"labels": torch.tensor([3, 2**40])},
        {"num_items": torch.ones(2)},
        {"chunk": -5},
    ],
    ids=lambda changes: "-".join(f"{k}{list(getattr(v, 'shape', [v]))}" for k, v in changes.items()),
)
def test_the_raw_op_with_hostile_arguments(backend, device, changes):
    labels = changes.get("labels")
    if device.type == "cuda" and labels is not None and int(labels.max()) >= 2**40:
        assert raw(device, **changes)[0].isnan()  # values on a GPU are not looked at
    else:
        with pytest.raises((ValueError, TypeError, IndexError)):
            raw(device, **changes)
    raw(device)


def test_compiled_code_refuses_labels_too():
    torch._dynamo.reset()
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    arguments = torch.ones(2, 4), torch.ones(9, 4)
    compiled(*arguments, torch.tensor([3, 4]))
    with pytest.raises(IndexError, match=r"labels must lie in \[0, V\)=\[0, 9\), got 11"):
        compiled(*arguments, torch.tensor([3, 11]))

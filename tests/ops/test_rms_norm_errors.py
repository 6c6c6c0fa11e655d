# SPDX-License-Identifier: Apache-2.0
"""What rms_norm refuses: the message names op, argument, what was expected and what came."""

import re

import pytest
import torch

from fastprompt.ops import rms_norm

OP = "rms_norm"
SEED = torch.tensor([1])


def case(error, message, **changes):
    return pytest.param(error, message, changes, id=message[:40])


REFUSED = [
    case(TypeError, "x must be a torch.Tensor, got list", x=[1.0]),
    case(TypeError, "w must be a torch.Tensor, got NoneType", w=None),
    case(TypeError, "x must have dtype float32, .*, got int64", x=torch.ones(2, 4, dtype=torch.int64)),
    case(TypeError, "w must have dtype .*, got complex64", w=torch.ones(4, dtype=torch.complex64)),
    case(TypeError, "x must be a dense tensor, got layout torch.sparse_coo", x=torch.ones(2, 4).to_sparse()),
    case(ValueError, r"x must have shape \[..., D\], got a scalar", x=torch.ones(())),
    case(ValueError, r"w must have shape \[D\]=\[4\], got \[5\]", w=torch.ones(5)),
    case(ValueError, r"w must have shape \[D\]=\[4\], got \[1, 4\]", w=torch.ones(1, 4)),
    case(ValueError, "w must be on cpu like x, got meta", w=torch.ones(4, device="meta")),
    case(ValueError, "w must be frozen, got requires_grad=True", w=torch.ones(4, requires_grad=True)),
    case(ValueError, "eps must not be negative, got -1e-06", eps=-1e-6),
    case(ValueError, "eps must not be negative, got nan", eps=float("nan")),
    case(TypeError, "eps must be a number, got str", eps="a"),
    case(TypeError, "dropout_p must be a number, got NoneType", residual=torch.ones(2, 4), dropout_p=None),
    case(ValueError, "dropout_p=0.1 needs a residual", dropout_p=0.1),
    case(TypeError, "dropout_p must be a number, got str", dropout_p="0.1"),
    case(ValueError, "a seed needs a residual", seed=SEED),
    case(TypeError, "residual must be a torch.Tensor, got float", residual=1.0),
    case(TypeError, "residual must have dtype .*, got int32", residual=torch.ones(2, 4, dtype=torch.int32)),
    case(ValueError, r"residual must have shape .*=\[2, 4\], got \[4\]", residual=torch.ones(4)),
    case(ValueError, "residual must be on cpu like x, got meta", residual=torch.ones(2, 4, device="meta")),
    case(ValueError, r"dropout_p must lie in \[0, 1\], got 1.5", residual=torch.ones(2, 4), dropout_p=1.5),
    case(ValueError, r"dropout_p must lie in \[0, 1\], got -0.1", residual=torch.ones(2, 4), dropout_p=-0.1),
    case(ValueError, "dropout_p .*got nan", residual=torch.ones(2, 4), dropout_p=float("nan")),
    case(TypeError, "seed must have dtype int64, got int32", residual=torch.ones(2, 4), dropout_p=0.1, seed=SEED.int()),
    case(TypeError, "seed must be a torch.Tensor, got int", residual=torch.ones(2, 4), dropout_p=0.1, seed=3),
    case(
        ValueError, r"seed must have shape \[1\], got \[2\]",
        residual=torch.ones(2, 4), dropout_p=0.1, seed=SEED.repeat(2),
    ),
    case(
        ValueError, r"seed must be on cpu .*got meta\. Use seed\.to\('cpu'\)",
        residual=torch.ones(2, 4), dropout_p=0.1, seed=SEED.to("meta"),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "changes"), REFUSED)
def test_refused_by_name(error, message, changes):
    arguments = {"x": torch.ones(2, 4), "w": torch.ones(4)} | changes
    with pytest.raises(error, match=f"^fastprompt::rms_norm: .*{message}"):
        rms_norm(**arguments)


def test_a_weight_to_be_trained_is_refused_with_the_remedy():
    w = torch.ones(4, requires_grad=True)
    with pytest.raises(ValueError, match=re.escape("w.requires_grad_(False)")):
        rms_norm(torch.ones(2, 4), w)
    with torch.no_grad():  # nothing would be lost: no gradient is asked for
        rms_norm(torch.ones(2, 4), w)


def test_the_raw_ops_refuse_a_weight_to_be_trained():
    w, x = torch.ones(4, requires_grad=True), torch.ones(2, 4)
    with pytest.raises(ValueError, match="w must be frozen"):
        torch.ops.fastprompt.rms_norm(x, w, 1e-6)
    with pytest.raises(ValueError, match="w must be frozen"):
        torch.ops.fastprompt.rms_norm_residual(x, x, w, None, 1e-6, 0.0)


def on(device, arguments):
    return [value.to(device) if isinstance(value, torch.Tensor) else value for value in arguments.values()]


def raw_backward(device, **changes):
    x = torch.randn(3, 40)
    arguments = {"dy": x, "x": x, "w": torch.ones(40), "rstd": torch.ones(3)}
    return torch.ops.fastprompt.rms_norm_backward(*on(device, arguments | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"dy": torch.ones(1, 40)},
        {"dy": torch.ones(3, 40, dtype=torch.float64)},
        {"dy": torch.ones(3, 40, dtype=torch.bfloat16)},
        {"w": torch.ones(1)},
        {"rstd": torch.ones(1)},
        {"rstd": torch.ones(3, dtype=torch.bfloat16)},
        {"x": torch.ones(())},
    ],
    ids=lambda changes: "-".join(f"{k}{tuple(v.shape)}{str(v.dtype)[5:]}" for k, v in changes.items()),
)
def test_raw_backward_with_hostile_tensors(backend, device, changes):
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        raw_backward(device, **changes)
    raw_backward(device)


def raw_residual_backward(device, **changes):
    h = torch.randn(3, 40)
    arguments = {"dy": h, "dh": h, "h": h, "w": torch.ones(40), "rstd": torch.ones(3), "seed": SEED}
    dtypes = {"dropout_p": 0.1, "x_dtype": torch.float32, "residual_dtype": torch.float32}
    return torch.ops.fastprompt.rms_norm_residual_backward(*on(device, arguments | dtypes | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"dy": torch.ones(1, 40)},
        {"dy": torch.ones(3, 40).bfloat16()},
        {"dh": torch.ones(1, 40)},
        {"dh": torch.ones(3, 40).bfloat16()},
        {"w": torch.ones(1)},
        {"rstd": torch.ones(1)},
        {"seed": None},
        {"seed": torch.ones(0, dtype=torch.int64)},
        {"seed": torch.ones(1)},
        {"dropout_p": 1.5},
        {"x_dtype": torch.bfloat16, "residual_dtype": torch.bfloat16},  # then h would be bfloat16
        {"x_dtype": torch.int64},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_raw_residual_backward_with_hostile_tensors(backend, device, changes):
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        raw_residual_backward(device, **changes)
    raw_residual_backward(device)

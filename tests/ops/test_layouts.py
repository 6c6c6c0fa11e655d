# SPDX-License-Identifier: Apache-2.0
"""Where a tensor's elements lie changes no bit of what an op computes: views with gaps, and expanded ones."""

import sys

import pytest
import torch
from samples import SAMPLES

from fastprompt import backend_used, use_backend
from fastprompt.dispatch import OPS

# torch's products may sum in another order where a matrix lies otherwise.
FACTORS = {"linear_cross_entropy": ("hidden", "weight")}
attention = sys.modules["fastprompt.ops.t5_attention"]
NAMES = sorted(set(OPS) - {"frozen_linear"})  # which is nothing but products


@pytest.fixture
def backend(request):
    if request.param == "emulated":
        request.getfixturevalue("emulated")
    return request.param


def with_gaps(x):
    """Like x, every second element of memory that is full of what must not be read."""
    junk = float("nan") if x.is_floating_point() else True if x.dtype == torch.bool else 127
    whole = torch.full((*x.shape, 2), junk, dtype=x.dtype, device=x.device)
    whole[..., 0] = x
    return whole[..., 0]


def expanded(x):
    return x[:1].expand_as(x)


def run(member, arguments):
    result = getattr(torch.ops.fastprompt, member)(*arguments)
    return (result,) if isinstance(result, torch.Tensor) else result


@pytest.mark.parametrize("layout", [with_gaps, expanded])
@pytest.mark.parametrize("name", NAMES)
def test_no_layout_changes_a_bit(backend, device, name, layout, monkeypatch):
    # On a GPU, too, the few queries of the samples go to the kernel that is under test.
    monkeypatch.setattr(attention, "FLOAT32_DECODE_ROWS", attention.DECODE_ROWS)
    if backend.startswith("cpu:") and backend not in OPS[name].backends():
        pytest.skip("no kernel of the op is compiled for it")
    moved = set()
    with torch.no_grad():
        samples = list(SAMPLES[name]())  # whose own calls are the default backend's
    with torch.no_grad(), use_backend(name, backend):
        for member, arguments in samples:
            schema = getattr(torch.ops.fastprompt, member).default._schema.arguments
            given = {argument.name for x, argument in zip(arguments, schema, strict=True) if x is not None}
            if backend == "emulated" and member == "t5_attention" and "cu_q" in given:
                continue  # CUDA C++ refuses packed rows, and here nothing asks for Triton's kernel instead
            copies, views = [], []
            for x, argument in zip(arguments, schema, strict=True):
                copy = view = x.detach().to(device) if isinstance(x, torch.Tensor) else x
                rises = argument.name.startswith("cu_")
                fixed = argument.name in FACTORS.get(name, ()) or (rises and layout is expanded)
                if isinstance(x, torch.Tensor) and x.numel() > 1 and not fixed:
                    view = layout(copy)
                    copy = view.clone(memory_format=torch.contiguous_format)
                    moved.add(member)
                copies.append(copy)
                views.append(view)
            found, expected = run(member, views), run(member, copies)
            # torch's own functions, of which the reference is made, take a view with gaps another way.
            bound = 1e-6 if backend_used(member) == "reference" else 0.0
            torch.testing.assert_close(found, expected, rtol=bound, atol=bound, equal_nan=True)
    assert moved == set(OPS[name].schemas)

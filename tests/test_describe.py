# SPDX-License-Identifier: Apache-2.0
"""Arguments that are known again pass without another look, and native kernels read tensors: csrc/describe.h."""

import itertools
import types

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastprompt import _native, use_backend
from fastprompt._native import CPU_TARGETS, describe
from fastprompt.dispatch import OPS, direct

pytestmark = pytest.mark.skipif(not CPU_TARGETS, reason="no compiled kernels")
X = torch.arange(12.0).view(3, 4)


class Own(torch.Tensor):
    """A subclass that computes nothing itself."""


DIFFERENT = [
    X,
    X.bfloat16(),
    X.half(),
    X.int(),
    X[:2],
    X[:, :2],
    X.view(4, 3).t(),
    X[None],
    X[:0],
    torch.complex(X, X).conj().imag,
    torch.inference_mode()(X.clone)(),
    None,
    True,
    False,
    1,
    0,
    -1,
    2**40,
    1.0,
    0.0,
    -0.0,
    float("nan"),
    "relu",
    "rel",
    "",
    torch.float32,
    torch.bfloat16,
    [],
    [X],
    [X, X],
    [[X], X],
]


def test_what_differs_is_described_differently():
    described = [describe(value) for value in DIFFERENT]
    assert all(type(each) is bytes for each in described)
    assert len(set(described)) == len(described)
    pairs = {describe(*pair) for pair in itertools.product(DIFFERENT, repeat=2)}
    assert len(pairs) == len(DIFFERENT) ** 2
    assert pairs.isdisjoint(described)


def test_values_of_tensors_do_not_count():
    assert describe(X, torch.nn.Parameter(X + 1), 0.5) == describe(-X, X.clone(), 0.5)
    wanted = X.clone().requires_grad_()
    assert describe(wanted) == describe(X)


@pytest.mark.parametrize(
    "value",
    [
        X.as_subclass(Own),
        X.to("meta"),
        X.to_sparse(),
        FakeTensorMode().from_tensor(X),
        (X,),
        {},
        2**70,
        1j,
        torch.device("cpu"),
        [X, object()],
        [torch.empty([1] * 60)] * 2,
        [X] * 100,
        "a" * 4096,
        "\ud800",
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_not_described(value):
    """What an op would refuse or leave to the dispatcher, or what is too long."""
    assert describe(X, value, X) is None
    assert describe(X) is not None


def test_what_a_transform_wraps_is_not_described():
    seen = []
    torch.func.vmap(lambda x: (seen.append(describe(x)), x)[1])(X)
    assert seen == [None]


@pytest.fixture
def checked(monkeypatch):
    """How often rms_norm's arguments were looked at."""
    schema, calls = OPS["rms_norm"].schemas["rms_norm"], []
    check = schema.check
    monkeypatch.setattr(schema, "check", lambda *args: (calls.append(args), check(*args)))
    monkeypatch.setattr(schema, "known", {})
    return calls


def test_known_arguments_are_not_looked_at_again(checked):
    with use_backend("rms_norm", "cpu:scalar"), torch.no_grad():
        w = torch.ones(4)
        for _ in range(3):
            direct.rms_norm(torch.randn(3, 4), w, 1e-6)
        assert len(checked) == 1
        direct.rms_norm(torch.randn(2, 4), w, 1e-6)
        direct.rms_norm(X, w, 1e-5)
        assert len(checked) == 3
        for _ in range(2):
            with pytest.raises(ValueError, match=r"w must have shape \[D\]=\[4\], got \[3\]"):
                direct.rms_norm(X, w[:3], 1e-6)
            with pytest.raises(ValueError, match="eps must"):
                direct.rms_norm(X, w, -1.0)
        assert len(checked) == 7
        direct.rms_norm(X, w, 1e-6)
        assert len(checked) == 7


def test_what_is_known_is_forgotten_before_it_is_much(checked, monkeypatch):
    monkeypatch.setattr("fastprompt.dispatch.calls.MOST_KNOWN", 4)
    with use_backend("rms_norm", "cpu:scalar"), torch.no_grad():
        for rows in (*range(1, 12), 11):
            y, _ = direct.rms_norm(X[:1].expand(rows, 4), torch.ones(4), 1e-6)
            assert y.shape == (rows, 4)
            assert 1 <= len(OPS["rms_norm"].schemas["rms_norm"].known) <= 4
    assert len(checked) == 11


def test_known_arguments_run_what_is_in_use(monkeypatch):
    """Also an op whose default on a CPU may be PyTorch's own, of which nothing is registered."""
    monkeypatch.setattr(OPS["frozen_linear"].schemas["frozen_linear"], "known", {})
    x, w = torch.randn(2, 64, 64)
    with torch.no_grad():
        expected = [direct.frozen_linear(x, w)]
        for backend in ("reference", "cpu:scalar", "reference"):
            with use_backend("frozen_linear", backend):
                direct.frozen_linear(x, w)
                expected.append(direct.frozen_linear(x, w))
                assert OPS["frozen_linear"].last_backend["frozen_linear"] == backend
        expected.append(direct.frozen_linear(x, w))
    assert torch.equal(expected[0], expected[-1])
    assert torch.equal(expected[1], expected[3])


def test_kernels_take_tensors_numbers_and_addresses():
    kernel = _native.TARGETS["scalar"].rms_norm
    w, y, rstd = torch.ones(4), torch.empty(3, 4), torch.empty(3)
    numbers = [3, 4, 1e-6, 0, 0]
    assert kernel.signature == "ppppiidiip"
    assert (kernel.name, kernel.target) == ("rms_norm", "scalar")
    assert kernel(X, torch.nn.Parameter(w), y.as_subclass(Own), rstd, *numbers, None) == 0
    expected = X * (X.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=0)
    y.zero_()
    assert kernel(*(x.data_ptr() for x in (X, w, y, rstd)), *numbers, 0) == 0
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=0)
    tensors = [X, w, y, rstd]
    for bad, match in (
        ([*tensors, 3.0, *numbers[1:], None], "there must be an int as argument 4 "),
        ([*tensors, X, *numbers[1:], None], "there must be an int as argument 4 "),
        ([X, w, "y", rstd, *numbers, None], "there must be a tensor or None as argument 2 "),
        ([*tensors, *numbers[:2], "1", 0, 0, None], "must be real number"),
        ([*tensors, 2**70, *numbers[1:], None], "too large|too big"),
    ):
        with pytest.raises((TypeError, OverflowError, RuntimeError), match=match):
            kernel(*bad)
    with pytest.raises(TypeError, match="takes 10 arguments, got 11"):
        kernel(*tensors, *numbers, stream=None, other=1)
    with pytest.raises((RuntimeError, ValueError, BufferError)):
        kernel(X.to_sparse(), *tensors[1:], *numbers, None)
    with pytest.raises(TypeError, match="cannot create"):
        type(kernel)()


@pytest.mark.parametrize("lacks", ["Tensor", "nn", "dtype", "_C", "the protocol"])
def test_a_torch_of_another_kind_is_refused(lacks):
    """And what was learned before stays."""
    names = {name: getattr(torch, name) for name in ("Tensor", "nn", "dtype", "_C") if name != lacks}
    if lacks == "the protocol":
        names["Tensor"] = object
    from fastprompt import _C

    with pytest.raises(ImportError, match="does not share its tensors by DLPack 1's exchange protocol"):
        _C.learn_torch(types.SimpleNamespace(**names))
    assert describe(X) is not None

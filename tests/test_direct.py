# SPDX-License-Identifier: Apache-2.0
"""Ops as this package calls them: without the dispatcher, where it would look at nothing but the device."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastprompt import backend_used, backends, use_backend
from fastprompt.dispatch import direct
from fastprompt.dispatch.plain import is_capturing, is_plain
from fastprompt.ops import dropout_add, gated_act, rms_norm
from fastprompt.testing import saved_bytes


@pytest.fixture
def hidden(device):
    return torch.randn(3, 8, device=device), torch.rand(8, device=device)


def test_direct_calls_run_the_backend_in_use(hidden):
    x, w = hidden
    with torch.no_grad():
        for backend in reversed(backends("rms_norm", x.device.type)):
            with use_backend("rms_norm", backend):
                expected = torch.ops.fastprompt.rms_norm(x, w, 1e-6)
                found = direct.rms_norm(x, w, 1e-6)
                assert backend_used("rms_norm") == backend
            assert all(map(torch.equal, found, expected))
        direct.rms_norm(x, w, 1e-6)
        assert backend_used("rms_norm") == backends("rms_norm", x.device.type)[0]


def test_a_backward_is_no_run_of_its_op(hidden):
    x, w = hidden
    with use_backend("rms_norm", "reference"):
        y = rms_norm(x.requires_grad_(), w)
    y.sum().backward()
    assert backend_used("rms_norm") == "reference"
    assert backend_used("rms_norm_backward") == backends("rms_norm", x.device.type)[0]


def test_direct_calls_do_without_the_dispatcher_where_nothing_else_decides(hidden, monkeypatch):
    x, w = hidden
    with torch.no_grad():
        assert is_plain(x)
        assert is_plain(torch.nn.Parameter(x))
        with torch.inference_mode():
            assert is_plain(x)
            assert is_plain(x + 1)
        overload = torch.ops.fastprompt.rms_norm.default
        monkeypatch.setattr(type(overload), "__call__", lambda *args: pytest.fail("dispatched"))
        direct.rms_norm(x, w, 1e-6)


def test_nor_is_the_dispatcher_asked_where_a_gradient_is_recorded(hidden, monkeypatch):
    x, w = hidden
    x.requires_grad_()
    results = []
    for function in (torch.ops.fastprompt.rms_norm, direct.rms_norm):
        if function is direct.rms_norm:
            overload = torch.ops.fastprompt.rms_norm.default
            for name in ("__call__", "redispatch"):
                monkeypatch.setattr(type(overload), name, lambda *args: pytest.fail("dispatched"))
        for backend in backends("rms_norm", x.device.type):
            with use_backend("rms_norm", backend), saved_bytes() as saved:
                y, rstd = function(x, w, 1e-6)
                assert backend_used("rms_norm") == backend
            assert not rstd.requires_grad
            results.append((y, *torch.autograd.grad(y, x, torch.ones_like(y)), saved.bytes))
    for found, expected in zip(results[len(results) // 2 :], results, strict=False):
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])
        assert found[2] == expected[2]


class Within(TorchDispatchMode):
    """Calls an op while it handles another."""

    def __init__(self, call):
        super().__init__()
        self.call, self.result = call, None

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.result = self.call()
        return function(*args, **(kwargs or {}))


def test_nothing_is_recorded_below_autograd(hidden):
    x, w = hidden
    x.requires_grad_()
    with torch.inference_mode(), torch.enable_grad():
        assert not rms_norm(x, w).requires_grad
        assert not dropout_add(x, x).requires_grad
    with Within(lambda: rms_norm(x, w)) as within:
        x * 2
    assert not within.result.requires_grad
    with torch._C._AutoDispatchBelowAutograd():
        assert not rms_norm(x, w).requires_grad
    assert rms_norm(x, w).requires_grad


@pytest.mark.parametrize("recorded", [False, True])
def test_a_number_in_a_tensor_is_read_and_checked_by_every_call(hidden, recorded):
    x, _ = hidden
    seed, p = torch.tensor([3], device=x.device), torch.tensor(0.5)
    x.requires_grad_(recorded)
    for _ in range(2):
        h = dropout_add(x, dropout_p=p, seed=seed)
    assert torch.equal(h, dropout_add(x, dropout_p=0.5, seed=seed))
    p.fill_(0.0)
    if recorded:
        assert torch.equal(torch.autograd.grad(h.sum(), x)[0] == 0.0, h == 0.0)
    p.fill_(5.0)
    with pytest.raises(ValueError, match=r"dropout_p must lie in \[0, 1\]"):
        dropout_add(x, dropout_p=p, seed=seed)


def test_arguments_that_were_checked_are_checked_again_where_they_differ(hidden):
    x, w = hidden
    with torch.no_grad():
        rms_norm(x, w)
    rms_norm(x.requires_grad_(), w)
    with pytest.raises(ValueError, match="w must be frozen"):
        rms_norm(x, w.clone().requires_grad_())
    with pytest.raises(ValueError, match="w must be frozen"):
        direct.rms_norm(x, w.clone().requires_grad_(), 1e-6)
    with pytest.raises(ValueError, match=r"w must have shape \[D\]"):
        rms_norm(x, w[:3])


@pytest.mark.parametrize("device_of_new", ["cpu", "meta"])
def test_nor_where_there_is_a_default_device(hidden, monkeypatch, device_of_new):
    x, w = hidden
    expected = [rms_norm(x, w), dropout_add(x, dropout_p=0.5, seed=torch.tensor([3], device=x.device))]
    overload = torch.ops.fastprompt.rms_norm.default
    monkeypatch.setattr(type(overload), "__call__", lambda *args: pytest.fail("dispatched"))
    seed = torch.tensor([3], device=x.device)
    with torch.device(device_of_new):
        found = [rms_norm(x, w), dropout_add(x, dropout_p=0.5, seed=seed)]
        recorded = rms_norm(x.requires_grad_(), w)
        recorded.sum().backward()
    assert all(map(torch.equal, found, expected))
    assert x.grad.device == x.device
    assert recorded.requires_grad


class SeenFunctions(TorchFunctionMode):
    names = ()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.names += (str(function),)
        return function(*args, **(kwargs or {}))


def test_hooks_on_saved_tensors_are_called_as_elsewhere(hidden):
    x, w = hidden
    seen = SeenFunctions()

    def pack(tensor):
        with seen:
            return tensor * 1

    with torch.device("cpu"), torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed):
        rms_norm(x.requires_grad_(), w).sum().backward()
    assert any("mul" in name for name in seen.names)


def test_a_function_mode_sees_the_ops(hidden):
    x, w = hidden
    for grad in (False, True):
        with torch.set_grad_enabled(grad), torch.device(x.device), SeenFunctions() as seen:
            rms_norm(x.requires_grad_(), w)
        assert any("rms_norm" in name for name in seen.names)


def test_scopes_may_end_in_any_order(hidden):
    x, w = hidden
    first, second = (use_backend("rms_norm", each) for each in backends("rms_norm", x.device.type)[-2:])
    with torch.no_grad():
        used = []
        for step in (first.__enter__, second.__enter__, first.__exit__, second.__exit__):
            step(*([None] * 3 if step.__name__ == "__exit__" else []))
            torch.ops.fastprompt.rms_norm(x, w, 1e-6)
            dispatched = backend_used("rms_norm")
            direct.rms_norm(x, w, 1e-6)
            used.append(backend_used("rms_norm"))
            assert used[-1] == dispatched
    assert len(set(used)) == 3


def test_torch_compile_asks_for_no_stream():
    """Of a GPU's tensors neither: a question that it cannot trace."""
    capturing = torch.compile(lambda: is_capturing(torch.device("cuda")), backend="eager", fullgraph=True)
    assert not capturing()


def test_other_devices_are_the_dispatchers():
    x, w = torch.empty(3, 8, device="meta"), torch.empty(8, device="meta")
    with torch.no_grad():
        assert direct.rms_norm(x, w, 1e-6)[0].is_meta


class Own(torch.Tensor):
    """A subclass that computes nothing itself."""


def test_any_tensor_that_is_not_plain_takes_the_call_to_the_dispatcher(hidden):
    x, w = hidden
    negative = torch.complex(w, -w).conj().imag.detach()  # minus -w, in a bit of the tensor
    assert negative.is_neg()
    with torch.no_grad():
        assert torch.equal(direct.rms_norm(x, negative, 1e-6)[0], direct.rms_norm(x, w, 1e-6)[0])
        assert isinstance(direct.rms_norm(x, w.as_subclass(Own), 1e-6)[0], Own)
        with pytest.raises(TypeError, match=r"must be a torch\.Tensor, got list"):
            rms_norm([1.0], w)


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


def test_direct_calls_are_seen_by_what_sees_other_ops(hidden):
    x, w = hidden
    name = "fastprompt::rms_norm"
    with torch.no_grad():
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert isinstance(direct.rms_norm(mode.from_tensor(x), w, 1e-6)[0], FakeTensor)
        assert torch.func.functionalize(lambda x: direct.rms_norm(x, w, 1e-6)[0])(x).shape == x.shape
    for recorded in (False, True):
        x.requires_grad_(recorded)
        with torch.set_grad_enabled(recorded):
            with Seen() as seen:
                direct.rms_norm(x, w, 1e-6)
            assert name in seen.names
            with torch.profiler.profile() as profile:
                direct.rms_norm(x, w, 1e-6)
            assert name in {event.key for event in profile.key_averages()}
            with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
                direct.rms_norm(forward_ad.make_dual(x, x), w, 1e-6)
    y, _ = direct.rms_norm(x, w, 1e-6)
    assert y.requires_grad


def test_torch_fx_traces_them(hidden):
    x, _ = hidden
    traced = torch.fx.symbolic_trace(lambda a, b: gated_act(a, b))
    assert torch.equal(traced(x, x), gated_act(x, x))

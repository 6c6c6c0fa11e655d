# SPDX-License-Identifier: Apache-2.0
"""Does anything but a tensor's device decide what an op on it does: a subclass, mode, transform, tracer, profiler?

Where nothing does, calls go around torch's dispatcher (docs/decisions/0015).
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import torch
from torch.autograd import forward_ad, profiler
from torch.utils._device import DeviceContext


def is_plain(x: torch.Tensor) -> bool:
    """May ops on x go around the dispatcher?

    So it is where that would look at nothing but x's device: without a subclass, mode, transform, tangent, tracer or
    profiler.
    """
    return is_plain_call() and plain_key(x) is not None


def is_plain_call() -> bool:
    """The same of a call, whatever its tensors are."""
    return (
        not torch.compiler.is_compiling()
        and forward_ad._current_level < 0
        and not profiler._is_profiler_enabled
        and (torch._C._len_torch_function_stack() == 0 or _has_default_devices_alone())
        and torch._C._dispatch_tls_local_include_set().raw_repr() in _PLAIN_CALLS
    )


def _has_default_devices_alone() -> bool:
    """Are the function modes torch.set_default_device's and torch.device's? They decide about new tensors alone."""
    modes = map(torch._C._get_function_stack_at, range(torch._C._len_torch_function_stack()))
    return all(type(mode) is DeviceContext for mode in modes)


def is_below_autograd() -> bool:
    """Is nothing recorded here, whatever requires grad: in inference mode, and where a mode handles an operation?"""
    return torch._C._dispatch_tls_is_dispatch_key_excluded(torch._C.DispatchKey.AutogradFunctionality)


def plain_key(x: torch.Tensor) -> str | None:
    """The dispatch key of x's device ("CPU", "CUDA"), if x has no other that matters."""
    if type(x) not in PLAIN_TYPES:
        return None
    keys = torch._C._dispatch_keys(x).raw_repr()
    found = _PLAIN_TENSORS.get(keys)
    if found is None:
        _PLAIN_TENSORS.update(dict.fromkeys(_plain_keys(x.device.type), x.device.type.upper()))
        found = _PLAIN_TENSORS.get(keys)
    return found


def plain_device(tensors: Sequence[torch.Tensor]) -> str:
    """The dispatch key of the first one's device, if none of them has another that matters; else an empty string."""
    found = ""
    for x in tensors:
        key = plain_key(x)
        if key is None:
            return ""
        found = found or key
    return found


def is_transformed() -> bool:
    """Inside forward-mode differentiation, torch.func, torch.jit.trace or an export to ONNX, all of which must see
    operators that they know: PyTorch's.
    """
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()
    return (
        forward_ad._current_level >= 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
    )


def may_keep(x: torch.Tensor) -> bool:
    """May what is made of x now be kept for other calls? Nothing of a transform or a mode, nor in a graph's memory."""
    return is_plain(x) and not torch.is_inference_mode_enabled() and not is_capturing(x.device)


def is_capturing(device: torch.device) -> bool:
    """Is a graph being recorded? torch.compile cannot trace the question, and gets no for an answer."""
    if torch.compiler.is_compiling():
        return False
    if device.type == "cpu":
        return getattr(_thread, "captures", False)
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@contextmanager
def capturing() -> Iterator[None]:
    """A ``with`` block in which this thread's operations on the CPU are recorded."""
    _thread.captures = True
    try:
        yield
    finally:
        _thread.captures = False


_thread = threading.local()


PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)  # not their subclasses
_PLAIN_TENSORS: dict[int, str] = {}  # the dispatch keys of plain tensors


def _plain_calls() -> frozenset[int]:
    """The dispatch keys that every call includes, inside torch.inference_mode and outside."""
    inside = torch._C.DispatchKeySet(torch._C.DispatchKey.BackendSelect)
    return frozenset((inside.raw_repr(), inside.add(torch._C.DispatchKey.ADInplaceOrView).raw_repr()))


_PLAIN_CALLS = _plain_calls()


@cache
def _plain_keys(device: str) -> frozenset[int]:
    """The dispatch keys of a tensor made inside torch.inference_mode and of one made outside."""
    found = []
    for inside in (False, True):
        with torch.inference_mode(inside):
            found.append(torch._C._dispatch_keys(torch.empty(0, device=device)).raw_repr())
    return frozenset(found)

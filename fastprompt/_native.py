# SPDX-License-Identifier: Apache-2.0
"""What the compiled extension offers on this machine: a namespace of kernels per target.

``FASTPROMPT_ISA=scalar|avx2|avx512|avx512_bf16|amx``, or ``scalar|neon``, caps the instruction set that the CPU kernels
use.
"""

import importlib
import os
import platform
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

CPU_ISAS = ("amx", "avx512_bf16", "avx512", "avx2", "neon", "scalar")  # best first
BF16_ISAS = ("amx", "avx512_bf16")  # they multiply bfloat16, and leave all else to AVX-512's kernels
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/common/dtype.h


def builds_here() -> bool:
    """Are there kernels for this system? setup.py has the same condition."""
    return platform.system() == "Linux"


def _isas() -> tuple[str, ...]:
    """Those that may be used, best first. Of others not even the extension is asked: the system would set up AMX."""
    best = os.environ.get("FASTPROMPT_ISA") or CPU_ISAS[0]
    if best not in CPU_ISAS:
        raise ValueError(f"FASTPROMPT_ISA must be one of {', '.join(CPU_ISAS)}, got {best!r}")
    return CPU_ISAS[CPU_ISAS.index(best) :]


class Native(NamedTuple):
    """What the extension offers, or, without one, what stands in for it."""

    targets: dict[str, SimpleNamespace]  # the kernels of each
    cpu_is_amd: bool = False
    describe: Callable[..., bytes | None] = lambda *_arguments: None  # csrc/describe.h
    record_calls: Callable[[list[Any] | None], Any] = lambda _calls: None  # csrc/bindings.cpp


def _load(isas: Sequence[str]) -> Native:
    remedy = "They are for Linux"
    if builds_here():
        remedy = "For the fast path install a wheel, or build with `pip install .` (needs g++ and Python's headers)"
    try:
        _C: Any = importlib.import_module("fastprompt._C")
        learn_torch, others = _C.learn_torch, (_C.cpu_is_amd, _C.describe, _C.record_calls)
        remedy = "For the fast path install PyTorch 2.11 or newer"
        learn_torch(torch)
    except (ImportError, AttributeError) as error:  # AttributeError: built from older sources
        warnings.warn(
            f"fastprompt runs without its compiled kernels ({error}): results are the same, but on a CPU "
            f"its ops and patched layers are slower than transformers'. {remedy}.",
            stacklevel=2,
        )
        return Native({})
    found = {target: _C.kernels(target) for target in (*isas, "cuda")}
    targets = {target: SimpleNamespace(**kernels) for target, kernels in found.items() if kernels}
    return Native(targets, *others)


TARGETS, CPU_IS_AMD, describe, _record_calls = _load(_isas())
# The instruction sets that can run here, best first.
CPU_TARGETS = tuple(isa for isa in CPU_ISAS if isa in TARGETS)


@contextmanager
def recorded_calls(calls: list[Any]) -> Iterator[None]:
    """A ``with`` block in which this thread's calls of kernels are appended to ``calls``: each as a function that makes
    it again, in the memory that its tensors have now, and its arguments.
    """
    before = _record_calls(calls)
    try:
        yield
    finally:
        _record_calls(before)


_thread = threading.local()


def take_torchs_threads() -> None:
    """Give this thread's OpenMP regions the number of torch.set_num_threads.

    OpenMP keeps it per thread; PyTorch sets it when the thread first asks for it.
    """
    if not hasattr(_thread, "told"):
        torch.get_num_threads()
        _thread.told = True


def covers(*tensors: torch.Tensor) -> bool:
    """Are all of dtypes that kernels take? They do not take float64."""
    return all(tensor.dtype in DTYPE_CODES for tensor in tensors)


def serves(kernel: Any, dtype: torch.dtype) -> bool:
    """Does a kernel of this target take tensors of this dtype?"""
    return dtype is torch.bfloat16 if kernel.target in BF16_ISAS else dtype in DTYPE_CODES


def contiguous(*tensors: torch.Tensor | None) -> list[Any]:
    """The tensors without gaps in memory, as kernels read those whose strides they are not told."""
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def is_elsewhere(device: torch.device) -> bool:
    """Is it a GPU other than the current one, to which a launch would go?"""
    return device.type == "cuda" and device.index != torch.cuda.current_device()


def stream(tensor: torch.Tensor) -> int:
    """The CUDA stream that work on ``tensor`` belongs to; 0 on a CPU."""
    return torch._C._cuda_getCurrentRawStream(tensor.get_device()) if tensor.is_cuda else 0

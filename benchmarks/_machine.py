# SPDX-License-Identifier: Apache-2.0
"""The machine under the benchmarks: what a record says of it, and the memory and caches that a call meets."""

import ctypes
import datetime
import platform
import re
import subprocess
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
EVICTION = {
    "cpu": 128 << 20,
    "cuda": 1 << 30,
}  # bytes; on a GPU writing them also gives the host a head start


def environment(device: str, threads: int) -> dict[str, object]:
    """What a number means nothing without."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "device": device_name(device),
        "threads": threads,
        **{name: _version(name) for name in ("torch", "transformers", "peft", "triton")},
    }


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return f"{found.group(1) if found else platform.processor()}, {torch.backends.cpu.get_cpu_capability()}"


def recycle_memory() -> bool:
    """Have glibc keep what tensors free, as PyTorch's allocator for GPUs does; False where there is no glibc.

    Left alone it returns large blocks to the system or not, by the order of earlier frees: one contender would pay a
    page fault per 4 KiB of its result, and the next none.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return bool(mallopt and mallopt(M_MMAP_THRESHOLD, 1 << 30) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


def peak_bytes(call: Callable[[], Any], device: str) -> int | None:
    """The most memory that ``call`` takes beyond what there is before; None where the system does not tell."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    libc = ctypes.CDLL(None)
    if not (reset.exists() and hasattr(libc, "malloc_trim")):
        return None
    libc.malloc_trim(0)  # what recycle_memory has kept would hide that it is needed
    reset.write_text("5")
    before = _resident("VmRSS", status)
    call()
    return _resident("VmHWM", status) - before


def _resident(field: str, status: Path) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", status.read_text())
    assert found
    return 1024 * int(found.group(1))


def evictor(device: str) -> torch.Tensor:
    """Writing to it empties the caches. Filled, for memory never written to is one shared page of zeros."""
    return torch.ones(EVICTION[device], dtype=torch.uint8, device=device)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None

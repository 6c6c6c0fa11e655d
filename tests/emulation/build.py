# SPDX-License-Identifier: Apache-2.0
"""Compiles .cu files with g++ and calls their kernels on the CPU. docs/cuda-emulation.md explains the emulation.

The kernels for other CPUs, too: for what multiplies bfloat16, and for vectors of four floats, as ARM's NEON has them.
"""

import ctypes
import hashlib
import math
import os
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CACHE = ROOT / "build" / "emulation"
FLAGS = [
    *("-x", "c++", "-std=c++17", "-O2", "-g1", "-fPIC", "-fvisibility=hidden"),
    "-ffp-contract=off",  # a GPU's __fmul_rn and __fadd_rn never fuse
    "-fno-strict-aliasing",  # kernels read a tensor's bytes as the vectors that suit them
    "-fsanitize=alignment",  # emulate.cpp reports what it finds
    *("-DFP_EMULATE", '-DFP_TARGET="emulated"', f"-I{ROOT / 'csrc'}", f"-I{HERE}"),
]
CPU_FLAGS = [
    *("-x", "c++", "-std=c++17", "-O2", "-g1", "-fPIC", "-fvisibility=hidden"),
    *("-fopenmp", "-ffp-contract=off", "-Wno-psabi", f"-I{ROOT / 'csrc'}", f"-I{HERE}"),
    *("-include", f"{HERE / 'poison.h'}"),
]
BF16_FLAGS = [*CPU_FLAGS, "-DFP_LANES=1", "-DFP_HAS_PAIRS"]
BF16_ALONE = [ROOT / "csrc" / "cpu" / "frozen_linear_pairs.cpp"]  # for no other instruction set
TILE_FLAGS = ["-DFP_HAS_TILES", "-DFP_EMULATED_AMX"]
NEON_FLAGS = [*CPU_FLAGS, "-DFP_LANES=4", '-DFP_TARGET="neon"']
ADDRESS = "-fsanitize=address"
SCHEDULES = ("forward", "reverse", "shuffled")
BAD_OPTION = -2  # csrc/common/kernel.h

_libraries: dict[Path, ctypes.CDLL] = {}
_schedule = (0, 0)


class _Slot(ctypes.Union):
    _fields_ = (("i", ctypes.c_int64), ("d", ctypes.c_double))


class _Kernel(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("target", ctypes.c_char_p), ("signature", ctypes.c_char_p))


class Tensor(ctypes.Structure):
    """csrc/common/kernel.h's Tensor."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("dims", ctypes.c_int64),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
    )

    @classmethod
    def at(cls, address: int, shape: Sequence[int], strides: Sequence[int] | None = None) -> "Tensor":
        """Without ``strides``: contiguous."""
        if strides is None:
            strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        sizes = ctypes.c_int64 * len(shape)
        return cls(address, len(shape), sizes(*shape), sizes(*strides))


class Kernel:
    """One native kernel, called like ``fastprompt._C.Kernel``."""

    def __init__(self, library: ctypes.CDLL, address: int) -> None:
        record = _Kernel.from_address(address)
        self.name, self.target = record.name.decode(), record.target.decode()
        self.signature = record.signature.decode()
        self._library, self._address = library, address

    def __call__(self, *arguments: Any) -> int:
        """Tensors may be PyTorch's, or of the class above."""
        if len(arguments) != len(self.signature):
            raise TypeError(f"{self.name}: takes {len(self.signature)} arguments, got {len(arguments)}")
        given = [
            Tensor.at(x.data_ptr(), x.shape, x.stride()) if hasattr(x, "data_ptr") else x for x in arguments
        ]
        slots = (_Slot * len(arguments))()
        for slot, letter, value in zip(slots, self.signature, given, strict=True):
            if letter == "d":
                slot.d = value
            elif isinstance(value, Tensor):
                slot.i = ctypes.addressof(value) if letter == "t" else value.data or 0
            else:
                slot.i = value or 0
        message = ctypes.create_string_buffer(1024)
        status = self._library.emulate_call(self._address, slots, message, len(message))
        if message.value:
            raise RuntimeError(f"{self.name}: {message.value.decode()}")
        if status == BAD_OPTION:
            raise ValueError(f"{self.name}: the kernel does not know this dtype or option")
        if status:
            raise RuntimeError(f"{self.name}: CUDA error {status}")
        return status


def emulated_kernels(sources: Sequence[Path] | None = None, *, sanitize: bool = False) -> SimpleNamespace:
    """Name -> kernel, of ``sources`` or of all production .cu files. Compiled once per content.

    Args:
        sources: .cu files.
        sanitize: with AddressSanitizer; this process must then run under LD_PRELOAD=libasan.so.
    """
    sources = sources or sorted(ROOT.glob("csrc/cuda/*.cu"))
    return _load_kernels(sources, [*FLAGS, "-O1", ADDRESS] if sanitize else FLAGS)


def bf16_kernels(isa: str) -> SimpleNamespace:
    """Name -> kernel, of those that multiply bfloat16, by instructions that are functions here: of pairs
    (csrc/cpu/pairs.h) or of AMX's tiles (amx.h).
    """
    flags = [*BF16_FLAGS, f'-DFP_TARGET="{isa}"', *(TILE_FLAGS if isa == "amx" else ())]
    return _load_kernels(sorted(ROOT.glob("csrc/cpu/t5_attention*.cpp")) + BF16_ALONE, flags)


def set_schedule(order: str = "forward", seed: int = 0) -> None:
    """In which order threads and blocks run from now on: "forward", "reverse", or "shuffled" by ``seed``."""
    global _schedule
    _schedule = (SCHEDULES.index(order), seed)
    for library in _libraries.values():
        library.emulate_set_schedule(*_schedule)


def four_lane_kernels() -> SimpleNamespace:
    """Name -> kernel of every op, in portable vectors of four floats."""
    return _load_kernels(sorted({*ROOT.glob("csrc/cpu/*.cpp")} - {*BF16_ALONE}), NEON_FLAGS)


def _load_kernels(sources: Sequence[Path], flags: list[str]) -> SimpleNamespace:
    library = _load(_build(sources, flags))
    return SimpleNamespace(**{kernel.name: kernel for kernel in _kernels(library)})


def _kernels(library: ctypes.CDLL) -> Iterator[Kernel]:
    index = 0
    while address := library.emulate_kernel(index):
        yield Kernel(library, address)
        index += 1


def _load(path: Path) -> ctypes.CDLL:
    if path not in _libraries:
        library = ctypes.CDLL(str(path))
        library.emulate_kernel.argtypes, library.emulate_kernel.restype = [ctypes.c_size_t], ctypes.c_void_p
        library.emulate_call.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t]
        library.emulate_call.restype = ctypes.c_int64
        library.emulate_set_schedule.argtypes = [ctypes.c_int, ctypes.c_uint64]
        library.emulate_set_schedule(*_schedule)
        _libraries[path] = library
    return _libraries[path]


def _build(sources: Sequence[Path], flags: list[str]) -> Path:
    headers = [*ROOT.glob("csrc/c*/*.h"), *HERE.glob("*.h")]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        compiled = pool.map(lambda source: _compile(source, headers, flags), [HERE / "emulate.cpp", *sources])
        objects = list(compiled)
    link = ["-shared", *(flag for flag in (ADDRESS, "-fopenmp") if flag in flags)]
    return _make(_key(objects, flags), ".so", [*link, *map(str, objects)])


def _compile(source: Path, headers: Sequence[Path], flags: list[str]) -> Path:
    return _make(f"{source.stem}-{_key([source, *headers], flags)}", ".o", [*flags, "-c", str(source)])


def _key(files: Sequence[Path], flags: list[str]) -> str:
    """A hash of what the files hold: objects are named after theirs, so their names will do."""
    digest = hashlib.sha256(repr(flags).encode())
    for file in sorted(files):
        digest.update(file.name.encode() if file.suffix == ".o" else file.read_bytes())
    return digest.hexdigest()[:16]


def _make(name: str, suffix: str, arguments: list[str]) -> Path:
    """Run g++ if the cache lacks its output; another process may be doing the same."""
    target = CACHE / (name + suffix)
    if not target.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        unfinished = CACHE / f"{name}.{os.getpid()}{suffix}"
        command = [os.environ.get("CXX", "g++"), *arguments, "-o", str(unfinished)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
        unfinished.replace(target)
    return target

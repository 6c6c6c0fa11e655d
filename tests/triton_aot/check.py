# SPDX-License-Identifier: Apache-2.0
"""Compile every Triton kernel for GPUs that are not here; read registers, spills and shared memory off the result.

Each module of ``fastprompt.triton_kernels`` lists calls of its launchers in ``aot_cases``. They run as on a GPU, but
on meta tensors, with a driver that knows only its target's name, and with compilation in place of the launch. So
what is checked is what the launcher would have launched there: its tile, its warps, Triton's specialisation.

    python tests/triton_aot/check.py --cc 80 90 100 --json FILE
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from importlib import import_module
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest.mock import patch

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from fastprompt import triton_kernels

TARGETS = (80, 90, 100)
SHARED_LIMIT = {
    80: 166912,
    86: 101376,
    89: 101376,
    90: 232448,
    100: 232448,
    120: 101376,
}  # bytes a block may have
SLICES = 4  # a module's cases per target are compiled in this many tasks
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

Case = tuple[Any, ...]  # a launcher and its arguments


class Result(NamedTuple):
    """What one kernel became for one target."""

    kernel: str
    variant: str  # constants and argument types
    cc: int
    registers: int
    spills: int  # instructions that move registers to the stack and back
    shared: int  # bytes
    loads: int  # load instructions in Triton's own code, one per tile and tensor
    narrow: int  # instructions that move less than 4 bytes per thread to or from device memory

    @property
    def problem(self) -> str:
        over = self.shared > SHARED_LIMIT[self.cc]
        return " ".join(
            [f"{self.spills} spills"] * (self.spills > 0) + [f"shared > {SHARED_LIMIT[self.cc]}"] * over
        )


class CompileOnlyDriver:
    """All that Triton asks of a driver before it launches."""

    def __init__(self, cc: int) -> None:
        self.cc = cc

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.cc, 32)

    def get_current_device(self) -> int:
        return self.cc  # Triton keeps one cache per device: have one per target

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiling_for(cc: int) -> Iterator[list[Any]]:
    """Launches inside the block compile for ``cc`` and append (JITFunction, compiled kernel) to the list."""
    compiled: list[Any] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        compiled.append((self, run(self, *args, grid=grid, warmup=True, **kwargs)))

    launch = import_module("fastprompt.triton_kernels._launch")
    with (
        patch.object(driver, "_active", CompileOnlyDriver(cc)),
        patch.object(JITFunction, "run", compile_only),
        patch.object(launch, "compute_capability", lambda device: cc),
    ):
        yield compiled


def compile_cases(cases: Iterable[Case], cc: int) -> list[Result]:
    with compiling_for(cc) as compiled:
        for launcher, *args in cases:
            launcher(*args)
    return list({(kernel, code.hash): inspect(kernel, code, cc) for kernel, code in compiled}.values())


def inspect(kernel: JITFunction, code: Any, cc: int) -> Result:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(code.asm["cubin"])
        cubin.flush()
        usage = _cuobjdump("--dump-resource-usage", cubin.name)
        registers, stack, local = (
            int(re.search(rf"\b{what}:(\d+)", usage)[1]) for what in ("REG", "STACK", "LOCAL")
        )
        # Disassembling takes longer than compiling, and without a stack there is nothing to find.
        code_text = _cuobjdump("--dump-sass", cubin.name) if stack or local else ""
    accesses = re.findall(r"\b(?:ld|st)\.global\S*?(?:\.v(\d))?\.[bus](\d+)\b", code.asm["ptx"])
    return Result(
        kernel=kernel.__name__,
        variant=describe(code),
        cc=cc,
        registers=registers,
        spills=len(re.findall(r"\b(?:STL|LDL)\b", code_text)),
        shared=code.metadata.shared,
        loads=code.asm["ttir"].count("tt.load"),
        narrow=sum(int(vector or 1) * int(bits) < 32 for vector, bits in accesses),
    )


def _cuobjdump(*arguments: str) -> str:
    return subprocess.run([CUOBJDUMP, *arguments], capture_output=True, text=True, check=True).stdout


def describe(code: Any) -> str:
    """E.g. ``D=512 BN=4 BD=512 warps=4 x:bf16 w:fp32``: constants, then the tensors that are not None."""
    names = list(code.src.signature)
    constants = [
        f"{names[i]}={value}" for (i,), value in code.src.constants.items() if isinstance(value, int)
    ]
    tensors = [f"{name}:{kind[1:]}" for name, kind in code.src.signature.items() if kind.startswith("*")]
    return " ".join([*constants, f"warps={code.metadata.num_warps}", *tensors])


def modules() -> list[ModuleType]:
    files = sorted(Path(triton_kernels.__path__[0]).glob("[a-z]*.py"))
    return [import_module(f"fastprompt.triton_kernels.{file.stem}") for file in files]


def kernels(module: ModuleType) -> set[str]:
    """The jitted functions of a module that none of its jitted functions calls: those that are launched."""
    jitted = {name: value for name, value in vars(module).items() if isinstance(value, JITFunction)}
    called = {name for function in jitted.values() for name in function.fn.__code__.co_names}
    return {name for name, function in jitted.items() if function.module == module.__name__} - called


def check(targets: Iterable[int] = TARGETS) -> list[Result]:
    """All cases of all modules for all targets, on as many processes as there are processors."""
    tasks = [(module.__name__, cc, part) for cc in targets for module in modules() for part in range(SLICES)]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        results = {result for part in pool.map(_compile_slice, *zip(*tasks, strict=True)) for result in part}
    return sorted(results)


def _compile_slice(module: str, cc: int, part: int) -> list[Result]:
    return compile_cases(islice(import_module(module).aot_cases(), part, None, SLICES), cc)


def table(results: list[Result]) -> str:
    lines = [f"{'kernel':30} {'sm':>3} {'regs':>4} {'spills':>6} {'shared':>6}  variant"]
    for r in results:
        numbers = f"{r.kernel:30} {r.cc:3} {r.registers:4} {r.spills:6} {r.shared:6}"
        lines.append(f"{numbers}  {r.variant}  {r.problem}".rstrip())
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cc", nargs="+", type=int, default=TARGETS, choices=sorted(SHARED_LIMIT))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    arguments = parser.parse_args()
    results = check(arguments.cc)
    if arguments.json:
        rows = [{**result._asdict(), "problem": result.problem} for result in results]
        arguments.json.write_text(json.dumps({"triton": triton.__version__, "results": rows}, indent=1))
    print(table(results))
    failed = sum(bool(result.problem) for result in results)
    print(f"triton {triton.__version__}: {len(results) - failed} kernels within their limits, {failed} not")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())

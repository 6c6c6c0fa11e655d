# SPDX-License-Identifier: Apache-2.0
"""Runs clang-tidy on the host C++ files, with the flags of the build's scalar target."""

import concurrent.futures
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11

ROOT = Path(__file__).resolve().parent.parent
FLAGS = [
    "-std=c++17", "-fopenmp", '-DFP_TARGET="scalar"', "-DFP_LANES=1", f"-I{ROOT / 'csrc'}",
    f"-isystem{pybind11.get_include()}", f"-isystem{sysconfig.get_path('include')}",
]  # fmt: skip


def gcc_include() -> str:
    """omp.h comes with the compiler that builds the extension, not with the clang-tidy wheel."""
    return subprocess.check_output(["g++", "-print-file-name=include"], text=True).strip()


def tidy(source: Path) -> subprocess.CompletedProcess[str]:
    command = [Path(sys.executable).parent / "clang-tidy", "--quiet", source, "--", *FLAGS]
    return subprocess.run([*command, "-idirafter", gcc_include()], capture_output=True, text=True, cwd=ROOT)


def main() -> int:
    sources = sorted([*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp")])
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        results = list(pool.map(tidy, sources))
    for result in results:
        if result.returncode != 0:
            print(result.stdout, result.stderr, sep="\n")
    print(f"clang-tidy: {len(sources)} files, {sum(r.returncode != 0 for r in results)} with findings")
    return int(any(result.returncode != 0 for result in results))


if __name__ == "__main__":
    sys.exit(main())

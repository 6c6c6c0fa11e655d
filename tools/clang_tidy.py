# SPDX-License-Identifier: Apache-2.0
"""Runs clang-tidy on the host C++ files in vectors of four floats, on what multiplies bfloat16 in each way, and on what
shuffles lanes where there is but one: Clang refuses there what GCC takes.
"""

import concurrent.futures
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from setup import BF16_SOURCES  # noqa: E402

FLAGS = [
    "-std=c++17", "-fopenmp", '-DFP_TARGET="scalar"', "-DFP_LANES=4", f"-I{ROOT / 'csrc'}",
    f"-isystem{pybind11.get_include()}", f"-isystem{sysconfig.get_path('include')}",
]  # fmt: skip
SHUFFLING_SOURCES = ("frozen_linear", "t5_attention")
ONE_LANE = ["-UFP_LANES", "-DFP_LANES=1"]
PAIRS = ["-DFP_HAS_PAIRS"]
TILES = [*PAIRS, "-DFP_HAS_TILES", "-DFP_EMULATED_AMX", f"-isystem{ROOT / 'tests' / 'emulation'}"]


def gcc_include() -> str:
    """omp.h comes with the compiler that builds the extension, not with the clang-tidy wheel."""
    return subprocess.check_output(["g++", "-print-file-name=include"], text=True).strip()


def tidy(source: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [Path(sys.executable).parent / "clang-tidy", "--quiet", source, "--", *FLAGS, *flags]
    return subprocess.run([*command, "-idirafter", gcc_include()], capture_output=True, text=True, cwd=ROOT)


def main() -> int:
    sources = sorted([*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp")])
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(tidy, source) for source in sources]
        ways = [(name, flags) for name in BF16_SOURCES for flags in (PAIRS, TILES)]
        ways += [(name, ONE_LANE) for name in SHUFFLING_SOURCES]
        jobs += [pool.submit(tidy, ROOT / "csrc" / "cpu" / f"{name}.cpp", *flags) for name, flags in ways]
        results = [job.result() for job in jobs]
    for result in results:
        if result.returncode != 0:
            print(result.stdout, result.stderr, sep="\n")
    print(f"clang-tidy: {len(results)} files, {sum(r.returncode != 0 for r in results)} with findings")
    return int(any(result.returncode != 0 for result in results))


if __name__ == "__main__":
    sys.exit(main())

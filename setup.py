# SPDX-License-Identifier: Apache-2.0
"""Builds fastprompt._C with ninja: each csrc/cpu/*.cpp once per instruction set, each csrc/cuda/*.cu if nvcc is here.

Kernels are built on Linux; elsewhere the package is Python alone, whose ops run on their PyTorch references.
Environment: FASTPROMPT_CUDA=auto|0|1, FASTPROMPT_GENCODE="80;90a;75+PTX", FASTPROMPT_SPILLS=error,
FASTPROMPT_SANITIZE=address,undefined, CXX, MAX_JOBS. Of an architecture with +PTX, drivers compile for all GPUs from
that one on that have no code here.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path
from tempfile import TemporaryDirectory

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CXX = os.environ.get("CXX") or "g++"
CXX_FLAGS = [
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-fopenmp",
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
]
# g++'s: loops that copy short rows by vectors would become calls of memcpy.
GCC_FLAGS = ["-fno-tree-loop-distribute-patterns"]
# target -> (lanes of float, compiler flags)
CPU_TARGETS = {"scalar": (1, [])}
if platform.machine() in ("x86_64", "AMD64"):
    CPU_TARGETS["avx2"] = (8, ["-mavx2", "-mfma", "-mf16c"])
    # gcc 12 takes the undefined operand of some AVX-512 intrinsics for an uninitialised variable.
    avx512 = (
        "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c -Wno-uninitialized -Wno-maybe-uninitialized"
    )
    CPU_TARGETS["avx512"] = (16, avx512.split())
    CPU_TARGETS["avx512_bf16"] = (16, [*avx512.split(), "-mavx512bf16", "-DFP_HAS_PAIRS"])
    CPU_TARGETS["amx"] = (
        16,
        [*avx512.split(), "-mavx512bf16", "-mamx-tile", "-mamx-bf16", "-DFP_HAS_PAIRS", "-DFP_HAS_TILES"],
    )
elif platform.machine() in ("aarch64", "arm64"):
    CPU_TARGETS["neon"] = (4, [])
# Targets that multiply bfloat16, and what does so; their other kernels would be AVX-512's.
BF16_TARGETS = ("avx512_bf16", "amx")
BF16_ALONE = ("frozen_linear_pairs",)  # for no other target
BF16_SOURCES = (*BF16_ALONE, "t5_attention", "t5_attention_backward")


def compiles(source: Path, target: str) -> bool:
    """Is this file of csrc/cpu for the target?"""
    return source.stem in BF16_SOURCES if target in BF16_TARGETS else source.stem not in BF16_ALONE


def compiler_knows(flags: list[str]) -> bool:
    probe = [*shlex.split(CXX), *flags, "-x", "c++", "-fsyntax-only", os.devnull]
    return subprocess.run(probe, capture_output=True).returncode == 0


def cpu_targets() -> dict[str, tuple[int, list[str]]]:
    """Those that the compiler knows: g++ does AVX512_BF16 from version 10 on, AMX from 11."""
    known = dict(CPU_TARGETS)
    for target in BF16_TARGETS:
        flags = known.get(target, (0, []))[1]
        if flags and not compiler_knows(flags):
            print(f"{CXX} does not know {target}: what multiplies bfloat16 goes without")
            del known[target]
    return known


def find_nvcc() -> str | None:
    want = os.environ.get("FASTPROMPT_CUDA", "auto")
    if want not in ("auto", "0", "1"):
        raise SystemExit(f"FASTPROMPT_CUDA must be auto, 0 or 1, got {want!r}")
    home = os.environ.get("CUDA_HOME")
    nvcc = (home and shutil.which("nvcc", path=f"{home}/bin")) or shutil.which("nvcc")
    if want == "1" and not nvcc:
        raise SystemExit(
            "FASTPROMPT_CUDA=1, but no nvcc is on PATH or in CUDA_HOME: install the CUDA toolkit"
        )
    if want == "0" or not nvcc:
        return None
    why = nvcc_fails(nvcc) if want == "auto" else None
    if why is not None:
        print(
            f"{nvcc} cannot compile here, so there will be no CUDA kernels. FASTPROMPT_CUDA=1 insists. {why}"
        )
        return None
    return nvcc


def cuda_folders(nvcc: str) -> tuple[list[str], list[str]]:
    """The toolkit's headers and libraries: of pip's and conda's, and behind a wrapper script, nvcc alone knows."""
    said = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    found = dict(line.removeprefix("#$ ").split("=", 1) for line in said.splitlines() if "=" in line)

    def folders(name: str, flag: str) -> list[str]:
        words = shlex.split(found.get(name, ""))
        return [os.path.realpath(word.removeprefix(flag)) for word in words if word.startswith(flag)]

    return folders("INCLUDES", "-I"), folders("LIBRARIES", "-L")


def nvcc_flags() -> list[str]:
    """Spills are errors for those who can mend them (FASTPROMPT_SPILLS=error): another nvcc's may have some."""
    host = shlex.split(CXX)
    if len(host) > 1 and Path(host[0]).name in ("ccache", "sccache"):
        del host[0]
    architectures = os.environ.get("FASTPROMPT_GENCODE", "80;90a;75+PTX").split(";")
    spills = ",--warning-as-error" if os.environ.get("FASTPROMPT_SPILLS") == "error" else ""
    return [
        *("-ccbin", host[0], *(f"-Xcompiler={flag}" for flag in host[1:])),
        *("-O3", "-std=c++17", "--threads", "2", "-Xcompiler=-fPIC,-fvisibility=hidden"),
        *map(gencode, architectures),
        *("-Xptxas", f"--warn-on-spills{spills}"),
    ]


def nvcc_fails(nvcc: str) -> str | None:
    """Why it cannot compile here: a host compiler or an architecture that it does not know."""
    with TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cu"
        source.write_text("__global__ void probe() {}\n")
        command = [nvcc, *nvcc_flags(), "-c", str(source), "-o", f"{folder}/probe.o"]
        done = subprocess.run(command, capture_output=True, text=True)
    return (done.stderr or done.stdout).strip() if done.returncode else None


def gencode(architecture: str) -> str:
    number = architecture.removesuffix("+PTX")
    return f"-gencode=arch=compute_{number},code={'sm' if number == architecture else 'compute'}_{number}"


def in_ninja(path: Path) -> str:
    """A path as ninja reads it in a build statement."""
    return "".join("$" + each if each in "$ :" else each for each in str(path))


def in_command(argument: str) -> str:
    """An argument of a rule's command: for the shell, through ninja."""
    return shlex.quote(argument).replace("$", "$$")


class NinjaBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        compiler = shlex.split(CXX)[:1]
        if not compiler or not shutil.which(compiler[0]):
            raise SystemExit(f"no C++ compiler {CXX!r} on PATH: install g++, or name yours in CXX")
        build_dir = Path(self.build_temp).resolve()
        build_dir.mkdir(parents=True, exist_ok=True)
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        (build_dir / "build.ninja").write_text(self.ninja_file(output))
        import ninja

        jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
        subprocess.check_call([Path(ninja.BIN_DIR) / "ninja", "-C", build_dir, *jobs])

    def ninja_file(self, output: Path) -> str:
        sanitize, nvcc = os.environ.get("FASTPROMPT_SANITIZE", ""), find_nvcc()
        cxx_flags = [*CXX_FLAGS, "-O3", *(GCC_FLAGS if compiler_knows(GCC_FLAGS) else ())]
        link_flags = ["-shared", "-fopenmp", "-Wl,--as-needed"]
        include = [sysconfig.get_path("include"), pybind11.get_include(), ROOT / "csrc"]
        if sanitize:
            checks = [f"-fsanitize={sanitize}", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
            cxx_flags = [*CXX_FLAGS, "-O1", "-g", *checks]
            link_flags.append(f"-fsanitize={sanitize}")
        if nvcc:
            headers, libraries = cuda_folders(nvcc)
            include += headers
            link_flags += [*(in_command(f"-L{folder}") for folder in libraries), "-l:libcudart_static.a"]
            link_flags += ["-lpthread", "-ldl", "-lrt", "-Wl,--exclude-libs,libcudart_static.a"]
        includes = " ".join(in_command(f"-I{path}") for path in include)
        compile_flags = f"$flags {includes} -MD -MF $out.d -c $in -o $out"
        lines = [
            "ninja_required_version = 1.5",
            f"cxx = {CXX.replace('$', '$$')}",
            f"rule cxx\n  command = $cxx {' '.join(cxx_flags)} {compile_flags}",
            "  depfile = $out.d\n  deps = gcc",
            f"rule cuda\n  command = {' '.join(map(in_command, [nvcc or 'nvcc', *nvcc_flags()]))} {compile_flags}",
            "  depfile = $out.d\n  deps = gcc",
            f"rule link\n  command = $cxx $in -o $out {' '.join(link_flags)}",
        ]
        objects = []

        def compile_object(rule: str, source: Path, name: str, *flags: str) -> None:
            objects.append(name)
            lines.append(f"build {name}: {rule} {in_ninja(source)}\n  flags = {' '.join(flags)}")

        for source in sorted(ROOT.glob("csrc/*.cpp")):
            compile_object("cxx", source, f"{source.stem}.o", *(["-DFP_WITH_CUDA"] if nvcc else []))
        targets = cpu_targets()
        for source in sorted(ROOT.glob("csrc/cpu/*.cpp")):
            for target, (lanes, isa) in targets.items():
                if not compiles(source, target):
                    continue
                defines = ["-fno-exceptions", f"-DFP_TARGET='\"{target}\"'", f"-DFP_LANES={lanes}"]
                compile_object("cxx", source, f"{source.stem}.{target}.o", *defines, *isa)
        for source in sorted(ROOT.glob("csrc/cuda/*.cu")) if nvcc else ():
            compile_object("cuda", source, f"{source.stem}.cuda.o", "-DFP_TARGET='\"cuda\"'")
        target = in_ninja(output)
        return "\n".join([*lines, f"build {target}: link {' '.join(objects)}", f"default {target}", ""])


if __name__ == "__main__":
    setup(
        packages=[
            "fastprompt",
            "fastprompt.commands",
            "fastprompt.demo",
            "fastprompt.dispatch",
            "fastprompt.graphs",
            "fastprompt.modules",
            "fastprompt.ops",
            "fastprompt.prompts",
            "fastprompt.training",
            "fastprompt.triton_kernels",
        ],
        # A top-level package named triton_kernels would collide with another project's.
        package_dir={"fastprompt": "fastprompt", "fastprompt.triton_kernels": "triton_kernels"},
        package_data={"fastprompt": ["py.typed"], "fastprompt.demo": ["tiny_t5/*"]},
        ext_modules=[Extension("fastprompt._C", sources=[])] if platform.system() == "Linux" else [],
        cmdclass={"build_ext": NinjaBuild},
        zip_safe=False,
    )

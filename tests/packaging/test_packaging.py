# SPDX-License-Identifier: Apache-2.0
"""What `pip install` gives a user: built from the sdist, in isolation, used from outside the repository."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*command: object, cwd: Path, **env: str) -> str:
    environment = {
        key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "TRITON_INTERPRET")
    }
    result = subprocess.run(
        [str(part) for part in command], cwd=cwd, env={**environment, **env}, capture_output=True, text=True
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """A copy of the files that git knows, without build products."""
    copy = tmp_path_factory.mktemp("source")
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines()
    for name in listed:
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="session")
def sdist(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "setup.py", "-q", "sdist", "-d", out, cwd=source)
    return next(out.glob("*.tar.gz"))


@pytest.fixture(scope="session")
def wheel(sdist, tmp_path_factory):
    """Built in isolation: pip brings setuptools, pybind11 and ninja, and no torch. In a folder with a space."""
    out = tmp_path_factory.mktemp("wheel")
    run(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "-w",
        out,
        sdist,
        cwd=out,
        FASTPROMPT_CUDA="0",
        TMPDIR=str(tmp_path_factory.mktemp("a folder")),
    )
    return next(out.glob("*.whl"))


@pytest.fixture(scope="session")
def manylinux(wheel, tmp_path_factory):
    """As others get it."""
    out = tmp_path_factory.mktemp("manylinux")
    run("bash", ROOT / "tools/manylinux.sh", wheel, out, cwd=out, PYTHON=sys.executable)
    [found] = out.glob("*.whl")
    return found


@pytest.fixture(scope="session")
def site(manylinux, tmp_path_factory):
    target = tmp_path_factory.mktemp("site")
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", target, manylinux, cwd=target)
    return target


def tracked(folder: str, pattern: str) -> set[str]:
    return {str(path.relative_to(ROOT)) for path in (ROOT / folder).glob(pattern)}


def test_sdist_is_complete(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = tracked("csrc", "**/*.[chp]*") | tracked("csrc", "**/*.cu") | tracked("triton_kernels", "*.py")
    wanted |= tracked("fastprompt", "**/*.py") | tracked("fastprompt/demo/tiny_t5", "*")
    wanted |= {"setup.py", "pyproject.toml", "README.md", "LICENSE", "fastprompt/py.typed"}
    assert wanted <= names, wanted - names


def test_wheel_is_complete_and_has_one_top_level_package(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = (
        tracked("fastprompt", "**/*.py") | tracked("fastprompt/demo/tiny_t5", "*") | {"fastprompt/py.typed"}
    )
    wanted |= {f"fastprompt/{name}" for name in tracked("triton_kernels", "*.py")}
    assert wanted <= names, wanted - names
    assert any(re.fullmatch(r"fastprompt/_C\..*\.so", name) for name in names)
    top = {name.partition("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"fastprompt"}


def test_the_wheel_runs_on_other_machines_and_brings_no_library(manylinux, wheel):
    assert re.search(r"-manylinux_2_\d+_\w+\.whl$", manylinux.name), manylinux.name
    added = set(zipfile.ZipFile(manylinux).namelist()) - set(zipfile.ZipFile(wheel).namelist())
    assert all(name.endswith("/") for name in added), added


def test_elsewhere_than_on_linux_the_wheel_is_python_alone(source, tmp_path):
    build = (
        "import platform, runpy; platform.system = lambda: 'Darwin';"
        "runpy.run_path('setup.py', run_name='__main__')"
    )
    run(sys.executable, "-c", build, "-q", "bdist_wheel", "-b", tmp_path / "b", "-d", tmp_path, cwd=source)
    [wheel] = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert tracked("fastprompt", "**/*.py") <= set(names)
    assert not [name for name in names if "/_C." in name]


def test_the_installed_package_runs_its_own_kernels(site, tmp_path):
    program = """
import pathlib, sys
import torch, fastprompt, fastprompt.triton_kernels
assert pathlib.Path(fastprompt.__file__).is_relative_to(sys.argv[1]), fastprompt.__file__
x = torch.randn(4, 96, requires_grad=True)
fastprompt.ops.rms_norm(x, torch.ones(96)).sum().backward()
print(fastprompt.backend_used("rms_norm"), fastprompt.backend_used("rms_norm_backward"), fastprompt.__version__)
"""
    output = run(sys.executable, "-c", program, site, cwd=tmp_path, PYTHONPATH=str(site), PYTHONSAFEPATH="1")
    assert output.startswith("cpu cpu 0."), output


def test_command_line(site, tmp_path):
    output = run(
        sys.executable,
        "-m",
        "fastprompt",
        "doctor",
        cwd=tmp_path,
        PYTHONPATH=str(site),
        PYTHONSAFEPATH="1",
    )
    assert "rms_norm" in output
    assert "scalar" in output


def test_extension_needs_no_cuda_driver_and_an_old_openmp(site):
    extension = next((site / "fastprompt").glob("_C.*.so"))
    needed = re.findall(r"NEEDED.*\[(.*)\]", run("readelf", "-d", extension, cwd=site))
    assert not [name for name in needed if "cuda" in name or "torch" in name], needed
    # torch's own libgomp exports up to GOMP_5.0: a newer symbol would not load beside it.
    assert not re.findall(r"GOMP_5\S*", run("objdump", "-T", extension, cwd=site))


def test_no_code_of_an_instruction_set_leaks_into_another(source, tmp_path):
    """A weak function compiled for AVX-512 could be the one that the linker keeps for the scalar target."""
    run(
        sys.executable, "setup.py", "-q", "build_ext", "--build-lib", tmp_path, "--build-temp", tmp_path / "objects",
        cwd=source, FASTPROMPT_CUDA="0",
    )  # fmt: skip
    objects = [path for path in (tmp_path / "objects").glob("*.o") if path.name != "bindings.o"]
    assert len(objects) >= 2
    for path in objects:
        weak = [line for line in run("nm", path, cwd=tmp_path).splitlines() if re.search(r" [WwVv] ", line)]
        assert not [line for line in weak if "__gxx_personality" not in line], path


@pytest.mark.parametrize(("want", "found"), [("auto", False), ("1", True), ("0", False)])
def test_an_nvcc_that_cannot_compile_here_is_left_out_unless_asked_for(tmp_path, want, found):
    """As one that does not know the host compiler."""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho unsupported GNU version >&2\nexit 1\n")
    nvcc.chmod(0o755)
    script = "import runpy; print(runpy.run_path('setup.py')['find_nvcc']())"
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "FASTPROMPT_CUDA": want}
    environment.pop("CUDA_HOME", None)
    said = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert said.splitlines()[-1] == (str(nvcc) if found else "None")
    assert ("unsupported GNU version" in said) == (want == "auto")

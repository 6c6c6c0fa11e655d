# SPDX-License-Identifier: Apache-2.0
"""``build``: tests/emulation/build.py, the same module that the ``emulated`` fixture of tests/conftest.py loads."""

import importlib.util
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from fastprompt.dispatch import OPS

NAME = "fastprompt_tests_emulation_build"


@pytest.fixture(scope="session")
def build():
    if NAME not in sys.modules:
        spec = importlib.util.spec_from_file_location(NAME, Path(__file__).with_name("build.py"))
        sys.modules[NAME] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[NAME])
    return sys.modules[NAME]


@pytest.fixture
def offer():
    """offer(op, backend, kernels): one more CPU backend of an op, while the test runs."""
    given = []

    def offer(op, backend, kernels):
        OPS[op].add_native_backend(backend, kernels, "CPU")
        given.append((op, backend))

    yield offer
    for op, backend in given:
        del OPS[op]._extra[backend]


@pytest.fixture(params=["forward", "reverse", "shuffled 1", "shuffled 2"])
def schedule(request, build):
    order, _, seed = request.param.partition(" ")
    build.set_schedule(order, int(seed or 0))
    yield request.param
    build.set_schedule()


@pytest.fixture
def run_sanitized(build):
    """Runs a Python script, which finds ``build`` and ``numpy``, in a process where sanitized kernels can be loaded."""

    def run(script):
        find = ["g++", "-print-file-name=libasan.so"]
        libasan = subprocess.run(find, capture_output=True, text=True).stdout.strip()
        environment = os.environ | {"LD_PRELOAD": libasan, "ASAN_OPTIONS": "detect_leaks=0"}
        lines = (
            f"import sys; sys.path.insert(0, {str(build.HERE)!r})\nimport build, numpy\n"
            + textwrap.dedent(script)
        )
        return subprocess.run([sys.executable, "-c", lines], env=environment, capture_output=True, text=True)

    return run

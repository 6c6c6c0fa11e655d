# SPDX-License-Identifier: Apache-2.0
"""Not under the interpreter: Triton decides for it or for the compiler when a kernel is defined."""

import importlib
import os
import sys
from pathlib import Path

import pytest


def pytest_ignore_collect():
    return True if os.environ.get("TRITON_INTERPRET") == "1" else None


@pytest.fixture(scope="session")
def check():
    """The module ``check.py``, by sys.path: the processes that it starts must find it too."""
    sys.path.insert(0, str(Path(__file__).parent))
    yield importlib.import_module("check")
    sys.path.pop(0)

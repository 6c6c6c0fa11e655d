# SPDX-License-Identifier: Apache-2.0
"""Everything here is of Triton: in the interpreter (TRITON_INTERPRET=1), or on a GPU with --device cuda."""

import pytest
from fastprompt.triton_kernels import _launch

from fastprompt.testing import poison_empty


@pytest.fixture(autouse=True)
def backend(request):
    if request.param != "triton":
        pytest.skip("of Triton")
    with poison_empty():
        yield request.param


@pytest.fixture(params=[(2048, 8192), (64, 16)], ids=["one tile", "many tiles"])
def tiles(request, monkeypatch):
    """Programs that take all of a tiny tensor, and programs of four rows that take 16 columns at a time."""
    elements, columns = request.param
    monkeypatch.setattr(_launch, "architecture", lambda device: _launch.Architecture(elements, processors=0))
    monkeypatch.setattr(_launch, "MAX_BLOCK", columns)

# SPDX-License-Identifier: Apache-2.0
"""What tests of t5_attention take."""

import pytest
from attention_case import page


@pytest.fixture
def _the_cuda_kernel_itself(monkeypatch):
    """In float32, too, where Triton's is chosen on a GPU."""
    monkeypatch.setattr(page, "FLOAT32_DECODE_ROWS", page.DECODE_ROWS)


@pytest.fixture(name="T", params=[7, 40])
def queries(request, slow):
    """So few queries that a CPU's kernel with vectors reads keys and values where they lie, or so many that it packs
    them.
    """
    return min(request.param, 12) if slow else request.param

# SPDX-License-Identifier: Apache-2.0
"""frozen_linear of a few rows where bfloat16 is multiplied as such, on any CPU: tests/ops/test_frozen_linear.py's own
tests of it, which run there on a CPU with AVX512_BF16.
"""

import pytest
import test_frozen_linear as tests

from fastprompt import _native, backend_used, use_backend

ISA = "avx512_bf16"


@pytest.fixture(autouse=True)
def bf16_backend(build, offer, monkeypatch):
    monkeypatch.setattr(tests.page, "SLOW_HALVES", ())
    offer(tests.OP, "emulated_isa", build.bf16_kernels(ISA))
    with use_backend(tests.OP, "emulated_isa"):
        yield "emulated_isa"


@pytest.fixture
def _ran():
    yield
    assert backend_used(tests.OP) == "emulated_isa"


@pytest.mark.usefixtures("_ran")
@pytest.mark.parametrize("shape", tests.FEW_IN_BF16, ids=str)
@pytest.mark.parametrize("layout", ["rows", "part"])
def test_few_rows(bf16_backend, shape, layout):
    tests.test_few_rows_in_bf16(bf16_backend, shape, layout)


@pytest.mark.usefixtures("_ran")
@pytest.mark.parametrize(
    "test",
    [
        tests.test_a_row_in_bf16_is_the_same_alone_and_among_others,
        tests.test_a_weight_per_example_in_bf16,
        tests.test_infinities_and_nan_in_bf16_stay_where_they_are,
        tests.test_more_in_bf16_is_torchs,
    ],
    ids=lambda test: test.__name__,
)
def test_of_the_op(bf16_backend, test):
    test(bf16_backend)


@pytest.mark.usefixtures("_ran")
@pytest.mark.parametrize("M", [3, 5, 13])
def test_rows_that_share_lines_of_the_cache(bf16_backend, M):
    tests.test_rows_in_bf16_that_share_lines_of_the_cache(bf16_backend, M)


def test_other_dtypes_are_not_taken():
    for dtype in (tests.torch.float32, tests.torch.float16):
        x, weight, _ = tests.draw(3, 48, 512, dtype=dtype)
        tests.frozen_linear(x, weight)
        assert backend_used(tests.OP) == "reference"


@pytest.mark.skipif(ISA not in _native.CPU_TARGETS, reason=f"needs a CPU with {ISA}")
def test_the_emulation_is_as_exact_as_the_cpu():
    """Lanes are added up in another order, in fp32: after rounding to bfloat16 few differ, and by little."""
    x, weight, _ = tests.draw(8, 100, 600, dtype=tests.torch.bfloat16)
    emulated = tests.frozen_linear(x, weight)
    with use_backend(tests.OP, f"cpu:{ISA}"):
        tests.torch.testing.assert_close(tests.frozen_linear(x, weight), emulated, rtol=2**-7, atol=1e-3)

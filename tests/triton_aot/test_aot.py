# SPDX-License-Identifier: Apache-2.0
"""Every Triton kernel compiles for every target within its limits, as ``check.py`` finds them."""

import pytest
import torch
import triton
import triton.language as tl


@triton.jit
def hungry_kernel(x, y, N: tl.constexpr):
    """One warp holds N * N elements at once: 512 registers a thread for N = 128."""
    o = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    b_x = tl.load(x + o)
    tl.store(y + o, b_x / tl.sum(b_x))


def launch_hungry(N):
    x = torch.empty(N, N, device="meta")
    hungry_kernel[(1,)](x, torch.empty_like(x), N=N, num_warps=1)


@pytest.fixture(scope="module")
def results(check):
    return check.check()


@pytest.mark.parametrize("cc", [80, 90, 100])
def test_a_kernel_that_spills_is_found(check, cc):
    (hungry,) = check.compile_cases([(launch_hungry, 128)], cc)
    assert "spills" in hungry.problem
    (modest,) = check.compile_cases([(launch_hungry, 16)], cc)
    assert not modest.problem


def test_a_kernel_with_too_much_shared_memory_is_found(check):
    (modest,) = check.compile_cases([(launch_hungry, 16)], 90)
    assert "shared" in modest._replace(shared=check.SHARED_LIMIT[90] + 1).problem


def test_every_kernel_is_compiled_for_every_target(check, results):
    kernels = {kernel for module in check.modules() for kernel in check.kernels(module)}
    assert len(kernels) >= 4
    assert {(r.kernel, r.cc) for r in results} == {(k, cc) for k in kernels for cc in check.TARGETS}


def test_no_kernel_spills_or_needs_too_much_shared_memory(check, results):
    print(check.table(results))
    failed = [result for result in results if result.problem]
    assert not failed, "\n" + check.table(failed)


def test_accesses_are_wide(check, results):
    """At T5's widths every thread moves whole words. Attention waits for products, and reads a mask of bytes.

    relu_dropout's bits are a byte per thread: the one narrow access beside 8 elements. A mean loss is one number.
    """
    few = {"relu_dropout_kernel": 1, "relu_dropout_backward_kernel": 1, "linear_cross_entropy_mean_kernel": 1}
    narrow = [
        r for r in results if r.narrow > few.get(r.kernel, 0) and not r.kernel.startswith("t5_attention")
    ]
    assert not narrow, "\n" + check.table(narrow)


def test_rows_are_read_once(results):
    """Both passes of rms_norm share their loads if a tile holds the row; in longer rows each has its own."""
    outputs = {"h", "y", "rstd"}, {"dresidual", "dx"}
    seen = set()
    for result in results:
        if result.kernel in ("rms_norm_kernel", "rms_norm_backward_kernel"):
            tensors = {part.partition(":")[0] for part in result.variant.split() if ":" in part}
            written = outputs["backward" in result.kernel]
            whole = "D=16384" not in result.variant
            seen.add(whole)
            assert (result.loads == len(tensors - written)) == whole, result
    assert seen == {True, False}

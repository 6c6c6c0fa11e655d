# SPDX-License-Identifier: Apache-2.0
"""What only linear_cross_entropy's CUDA kernel has: vector widths by alignment, teams by row length, rows in parts, any
order of threads. The op is tested in tests/ops, on this backend as well."""

import pytest
import torch
from loss_chunks import FIRST, D, expected, statistics

from fastprompt._native import DTYPE_CODES

DTYPES = tuple(DTYPE_CODES)


def run(emulated, logits, labels, top, total, picked, others, needs_grad=True, first=FIRST):
    (N, C), code = logits.shape, DTYPE_CODES[logits.dtype]
    tensors = logits, labels, top, total, picked, others if needs_grad and first else None
    assert emulated.linear_cross_entropy(*tensors, N, C, first, D, needs_grad, code, 0) == 0
    return logits, top, total, picked, others


def check(results, truth):
    weights, top, total, picked, others = results
    assert torch.equal(top, truth[1])
    assert torch.equal(picked, truth[3])
    for value, true_value in (weights, truth[0]), (total, truth[2]), (others, truth[4]):
        finfo = torch.finfo(value.dtype)
        torch.testing.assert_close(
            value.double(), true_value, rtol=4 * finfo.eps, atol=finfo.tiny * finfo.eps
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", range(1, 9))
def test_every_alignment(emulated, dtype, offset):
    """C = 24 is 3 vectors of 8; offsets of 8 bytes, 4 and others need vectors of 4 or single elements."""
    inputs = statistics(37, 24, dtype)
    truth = expected(*inputs)
    buffer = torch.full((inputs[0].numel() + 64,), 77.0, dtype=dtype)
    logits = buffer[16 + offset :][: inputs[0].numel()].view(37, 24)
    logits.copy_(inputs[0])
    check(run(emulated, logits, *inputs[1:]), truth)
    assert (buffer[: 16 + offset] == 77.0).all()
    assert (buffer[16 + offset + logits.numel() :] == 77.0).all()


@pytest.mark.parametrize(
    ("C", "dtype"),
    [
        (1, torch.float32),
        (7, torch.float16),
        (513, torch.bfloat16),  # 17 warps of single elements
        (1025, torch.float32),  # more than a block holds
        (2048, torch.float32),  # 4 warps
        (8192, torch.bfloat16),  # 8 warps
        (8192 + 4, torch.float32),  # more than a block holds
        (2 * 16384 + 8, torch.bfloat16),  # twice that, and one vector
    ],
    ids=str,
)
def test_every_length_of_row(emulated, C, dtype):
    inputs = statistics(10, C, dtype)
    truth = expected(*inputs)
    check(run(emulated, *inputs), truth)


@pytest.mark.parametrize("C", [24, 1025])
def test_without_a_gradient_only_the_statistics_change(emulated, C):
    inputs = statistics(9, C, torch.float32)
    copies = [x.clone() for x in inputs]
    logits, top, total, picked, others = run(emulated, *inputs, needs_grad=False)
    truth = run(emulated, *copies)
    assert all(map(torch.equal, (top, total, picked), truth[1:4]))
    assert torch.equal(logits, statistics(9, C, torch.float32)[0])
    assert torch.equal(others, statistics(9, C, torch.float32)[5])


@pytest.mark.parametrize("C", [24, 1025])
def test_the_first_chunk_reads_no_statistics(emulated, C):
    logits, labels, *garbage = statistics(9, C, torch.float32)
    labels -= FIRST
    nothing = [
        torch.full_like(x, value) for x, value in zip(garbage, (-torch.inf, 0.0, torch.nan, 0.0), strict=True)
    ]
    truth = expected(logits, labels + FIRST, *nothing)
    found = run(
        emulated, logits, labels, *(torch.full_like(x, torch.nan) for x in garbage[:3]), garbage[3], first=0
    )
    torch.testing.assert_close(found[3], truth[3], rtol=0, atol=0, equal_nan=True)
    check((*found[:3], truth[3].nan_to_num(), nothing[3]), (*truth[:3], truth[3].nan_to_num(), truth[4]))


@pytest.mark.parametrize(("C", "dtype"), [(7, torch.float32), (768, torch.bfloat16), (2048, torch.float32)])
def test_every_order_of_threads_gives_the_same_bits(emulated, build, schedule, C, dtype):
    results = run(emulated, *statistics(20, C, dtype))
    build.set_schedule("forward")
    assert all(map(torch.equal, results, run(emulated, *statistics(20, C, dtype))))


def test_not_a_number_reaches_the_sum_and_infinities_do_not_hang(emulated):
    inputs = statistics(8, 40, torch.float32)
    logits, labels = inputs[0], inputs[1]
    labels[:] = FIRST - 1
    logits[0, 3], logits[1, 4], logits[2] = torch.nan, torch.inf, -torch.inf
    logits[5] = -torch.inf  # and nothing was seen before
    weights, top, total, _, others = run(emulated, *inputs)
    assert total[:2].isnan().all()
    assert weights[0, 3].isnan()
    assert total[2:].isfinite().all()
    assert (top[5], total[5]) == (-torch.inf, 0.0)
    assert others[2:].isfinite().all()


def test_nothing_to_do(emulated):
    run(emulated, *(x[:0] for x in statistics(8, 16, torch.float32)))


def test_rows_without_columns_have_losses(emulated):
    N, V, code = 3, 4, DTYPE_CODES[torch.float32]
    labels, (top, total, picked), some = torch.arange(N), torch.rand(3, N), torch.ones(1)
    found = []
    for drows in (None, some):  # an empty tensor's address may be anything
        losses = torch.full((N,), torch.nan)
        emulated.linear_cross_entropy_rows(
            labels, top, total, picked, some, some, losses, drows, N, 0, V, 0, 0, -100, code, 0
        )
        found.append(losses)
    assert found[0].isfinite().all()
    assert torch.equal(*found)


def test_no_access_out_of_bounds(run_sanitized):
    """Under AddressSanitizer: every tensor of exactly its size, and labels full of garbage."""
    done = run_sanitized("""
        kernels = build.emulated_kernels(sanitize=True)
        random = numpy.random.default_rng(0)
        most = 2**63 - 1
        labels = numpy.array([0, 5, 6, 7, 100, -1, -100, most, -most - 1, 2**32 + 5, 105, 6, 1030])
        N = len(labels)
        for C in (1, 7, 8, 100, 1025, 4100):
            for D in (0, 1, 40):
                logits, others = (random.standard_normal((N, n)).astype(numpy.float32) for n in (C, D))
                top, total, picked = (random.standard_normal(N).astype(numpy.float32) for _ in range(3))
                arrays = [x.ctypes.data for x in (logits, labels, top, total, picked, others)]
                kernels.linear_cross_entropy(*arrays, N, C, 5, D, 1, 0, 0)
                kernels.linear_cross_entropy(*arrays[:5], 0, N, C, 5, D, 0, 0, 0)
                weight, drows = (random.standard_normal((n, D)).astype(numpy.float32) for n in (C, N))
                rows = [x.ctypes.data for x in (labels, top, total, picked, others, weight, total, drows)]
                kernels.linear_cross_entropy_rows(*rows, N, D, C, D, 0, -100, 0, 0)
                rows[4] = rows[7] = 0
                kernels.linear_cross_entropy_rows(*rows, N, D, C, D, 0, -100, 0, 0)
                mean = [x.ctypes.data for x in (total, labels, top, picked, others)]
                if D > 0:
                    kernels.linear_cross_entropy_mean(*mean, N, -100, 1.0, 0, 0)
        print("done")
    """)
    assert done.stdout == "done\n", done.stderr[-3000:]

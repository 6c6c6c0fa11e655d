# SPDX-License-Identifier: Apache-2.0
"""The emulation itself: right kernels are right in every order of threads, and planted faults are reported."""

from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent
LANES = np.arange(32)


@pytest.fixture(scope="module")
def planted(build):
    return build.emulated_kernels([HERE / "block_kernels.cu", HERE / "warp_kernels.cu"])


def address(array):
    return array.ctypes.data


@pytest.fixture
def x():
    return np.random.default_rng(0).standard_normal(4 * 64).astype(np.float32)


@pytest.mark.parametrize("name", ["sum", "sum_unseen"])
def test_block_sum_is_right_in_every_order(planted, schedule, x, name):
    out = np.full(4, np.nan, np.float32)
    getattr(planted, name)(address(x), address(out), 4, 64, 0)
    np.testing.assert_allclose(out, x.reshape(4, 64).sum(1), rtol=1e-5)


def test_missing_barrier_is_reported_in_every_order(planted, schedule, x):
    out = np.zeros(4, np.float32)
    with pytest.raises(RuntimeError, match=r"^sum_without_barrier: block .*: (race on|reads) shared partial"):
        planted.sum_without_barrier(address(x), address(out), 4, 64, 0)


@pytest.fixture
def set_schedule(build):
    yield build.set_schedule
    build.set_schedule()


def test_missing_barrier_out_of_sight_is_wrong_in_some_order(planted, build, set_schedule, x):
    wrong = []
    for order in build.SCHEDULES:
        set_schedule(order, seed=1)
        out = np.full(4, np.nan, np.float32)
        planted.sum_without_barrier_unseen(address(x), address(out), 4, 64, 0)
        wrong.append(not np.allclose(out, x.reshape(4, 64).sum(1), rtol=1e-4))
    assert any(wrong)


def test_shared_memory_reused_too_early(planted, schedule, x):
    out = np.zeros(128, np.float32)
    with pytest.raises(RuntimeError, match=r"race on shared value\[0\]: it (writes|reads) what was"):
        planted.reuse_without_barrier(address(x), address(out), 64, 0)


def test_a_write_after_the_reads_of_three_threads(planted, schedule):
    """Each of the reads counts, however many came after it."""
    out = np.zeros(64, np.float32)
    planted.written_after_reads(address(out), 0)
    assert out[[5, 40, 41]].tolist() == [1.0] * 3
    with pytest.raises(RuntimeError, match=r"race on shared value\[0\]: it (writes|reads) what was"):
        planted.written_among_reads(address(out), 0)


def test_barrier_that_some_threads_never_reach(planted, schedule):
    with pytest.raises(
        RuntimeError, match=r"waits for its block at .*_kernels.cu:\d+, but thread .* has ended"
    ):
        planted.barrier_that_some_miss(0)


def test_barriers_in_two_places(planted, schedule):
    with pytest.raises(
        RuntimeError, match=r"waits for its block at .*, but thread .* waits for its block at"
    ):
        planted.barriers_in_two_places(0)


def test_a_fault_leaves_the_emulation_fit_for_the_next_launch(planted, x):
    out = np.zeros(4, np.float32)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="has ended"):
            planted.barrier_that_some_miss(0)
        planted.sum(address(x), address(out), 4, 64, 0)
    np.testing.assert_allclose(out, x.reshape(4, 64).sum(1), rtol=1e-5)


def test_uninitialised_shared_memory(planted):
    out = np.zeros(4, np.float32)
    with pytest.raises(RuntimeError, match=r"reads shared value\[0\], which no thread has written"):
        planted.uninitialised(address(out), 0)
    planted.uninitialised_unseen(address(out), 0)
    assert np.isnan(out).all()


@pytest.mark.parametrize("index", [-1, 4])
def test_shared_index_out_of_range(planted, index):
    planted.shared_index(3, 0)
    with pytest.raises(RuntimeError, match=r"is outside shared value\[4\]"):
        planted.shared_index(index, 0)


def test_grid_and_block_in_three_dimensions(planted, schedule):
    out = np.full(3 * 2 * 5 * 4 * 3 * 2, -1, np.int32)
    planted.grid_places(address(out), 0)
    np.testing.assert_array_equal(out, np.arange(out.size))


@pytest.mark.parametrize(("blocks", "threads"), [(0, 32), (1, 0), (1, 1025)])
def test_impossible_launch(planted, blocks, threads):
    with pytest.raises(RuntimeError, match="CUDA error 9"):
        planted.launch_shape(blocks, threads, 0, 0)


def test_atomics(planted, schedule):
    x = np.random.default_rng(0).integers(-50, 50, 4 * 64).astype(np.int32)
    positive, largest, first = np.zeros(1, np.int32), np.full(1, -99, np.int32), np.full(1, -1, np.int32)
    total = np.zeros(1, np.float32)
    planted.atomics(address(x), address(positive), address(largest), address(total), address(first), 4, 64, 0)
    assert (positive[0], largest[0], total[0]) == ((x > 0).sum(), x.max(), x.sum())
    assert 1000 <= first[0] < 1004


def test_warp_exchanges(planted, schedule):
    out = np.zeros((8, 32), np.int32)
    planted.exchanges(address(out), 0)
    value = 100 + LANES
    np.testing.assert_array_equal(out[0], np.full(32, 105))
    np.testing.assert_array_equal(out[1], value[LANES ^ 3])
    np.testing.assert_array_equal(out[2], value[np.maximum(LANES - 1, 0)])
    np.testing.assert_array_equal(out[3], np.where(LANES % 8 < 5, value + 3, value))
    np.testing.assert_array_equal(out[4], np.full(32, sum(1 << i for i in range(0, 30, 3)) + (1 << 30)))
    np.testing.assert_array_equal(out[5], np.ones(32))
    np.testing.assert_array_equal(out[6], np.zeros(32))
    np.testing.assert_array_equal(out[7], np.where(LANES < 16, 100, 131))


def test_warp_sum_has_the_same_bits_in_every_lane_and_order(planted, schedule, x):
    out = np.zeros(96, np.float64)
    planted.warp_sums(address(x), address(out), 96, 0)
    expected = x[:96].astype(np.float64).reshape(3, 32)
    for half in (16, 8, 4, 2, 1):
        expected = expected[:, :half] + expected[:, half:]
    np.testing.assert_array_equal(out.reshape(3, 32), np.broadcast_to(expected, (3, 32)))


def test_syncwarp_orders_shared_memory(planted, schedule):
    out = np.zeros(32, np.int32)
    planted.handed_on(address(out), 0)
    np.testing.assert_array_equal(out, (LANES + 1) % 32)
    with pytest.raises(RuntimeError, match=r"shared tile\[\d+\]"):
        planted.handed_on_without_sync(address(out), 0)


def test_syncwarp_of_some_lanes_orders_those(planted, schedule):
    out = np.zeros(32, np.int32)
    for kernel in (planted.waits_for_writer, planted.waits_through_another):
        out[0] = 0
        kernel(address(out), 0)
        assert out[0] == 102
    planted.waits_for_readers(address(out), 0)
    assert out[[5, 6]].tolist() == [102] * 2
    for kernel in (planted.others_wait, planted.waits_alone, planted.waits_for_one_reader):
        with pytest.raises(RuntimeError, match=r"(race on|reads) shared value\[0\]"):
            kernel(address(out), 0)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            "shuffle_with_lane_at_barrier",
            r"waits for lanes 0xffffffff .*, but thread \(9, 0, 0\) waits for its block",
        ),
        (
            "shuffle_with_different_masks",
            "waits for lanes .* of its warp at .*, but thread .* waits for lanes",
        ),
        ("shuffle_from_absent_lane", "reads? lane 20, which takes no part"),
        ("shuffle_outside_mask", "which it is not one of"),
    ],
)
def test_warp_faults(planted, schedule, fault, message):
    with pytest.raises(RuntimeError, match=message):
        getattr(planted, fault)(address(np.zeros(32, np.int32)), 0)


def test_lanes_that_have_ended_are_not_waited_for(planted, schedule):
    out = np.full(32, -1, np.int32)
    planted.shuffle_without_ended_lane(address(out), 0)
    np.testing.assert_array_equal(out, np.where(LANES == 9, -1, 0))


def test_arguments_are_checked(planted):
    with pytest.raises(TypeError, match="sum: takes 5 arguments, got 1"):
        planted.sum(0)


def test_misaligned_vector(planted):
    memory = np.arange(64, dtype=np.float32)
    begin = -memory.ctypes.data // 4 % 4  # of a 16-byte unit
    x, out = address(memory[begin:]), np.zeros(8, np.float32)
    out = out[-out.ctypes.data // 4 % 4 :]
    planted.copied_four(x, address(out), 0)
    np.testing.assert_array_equal(out[:4], memory[begin : begin + 4])
    for misaligned in ((x + 4, address(out)), (x, address(out) + 8)):
        with pytest.raises(RuntimeError, match=r"misaligned access at .*block_kernels.cu:\d+"):
            planted.copied_four(*misaligned, 0)


def test_address_sanitizer_sees_a_global_access_out_of_bounds(run_sanitized):
    script = """
        kernels = build.emulated_kernels([build.HERE / "block_kernels.cu"], sanitize=True)
        x, out = numpy.ones(100, numpy.float32), numpy.zeros(100, numpy.float32)
        kernels.copied(x.ctypes.data, out.ctypes.data, 100, 0)
        assert (out == 1).all()
        print("right so far", flush=True)
        kernels.copied(x.ctypes.data, out.ctypes.data, 101, 0)
    """
    done = run_sanitized(script)
    assert "right so far" in done.stdout
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr

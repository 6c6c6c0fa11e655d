// SPDX-License-Identifier: Apache-2.0
// Kernels that test_emulation.py runs to test the emulation itself: what the lanes of a warp do together.
#include "common/kernel.h"
#include "cuda/launch.h"

namespace {

constexpr unsigned kAll = 0xffffffffu;

// out [8, 32]: what each lane gets from a call, from the value 100 + lane.
__global__ void exchange_all(int* out) {
    const int lane = static_cast<int>(threadIdx.x), value = 100 + lane;
    out[lane] = __shfl_sync(kAll, value, 5);
    out[32 + lane] = __shfl_xor_sync(kAll, value, 3);
    out[64 + lane] = __shfl_up_sync(kAll, value, 1);
    out[96 + lane] = __shfl_down_sync(kAll, value, 3, 8);
    out[128 + lane] = static_cast<int>(__ballot_sync(kAll, lane % 3 == 0));
    out[160 + lane] = __any_sync(kAll, lane == 7);
    out[192 + lane] = __all_sync(kAll, lane < 31);
    const unsigned half = lane < 16 ? 0x0000ffffu : 0xffff0000u;
    out[224 + lane] = __shfl_sync(half, value, lane < 16 ? 0 : 31);
}
int64_t exchanges(int* out, void* stream) { return launch(exchange_all, dim3(1), dim3(32), stream, out); }

// The same bits in every lane, whatever the order of the lanes.
__global__ void warp_sum(const float* x, double* out) {
    double sum = static_cast<double>(x[threadIdx.x]);
    for (int other = 16; other > 0; other /= 2) sum += __shfl_xor_sync(kAll, sum, other);
    out[threadIdx.x] = sum;
}
int64_t warp_sums(const float* x, double* out, int64_t threads, void* stream) {
    return launch(warp_sum, dim3(1), dim3(threads), stream, x, out);
}

// Lanes hand values on through shared memory.
template <bool kSync>
__global__ void hand_on(int* out) {
    FP_SHARED(int, tile, 32);
    const unsigned lane = threadIdx.x;
    tile[lane] = static_cast<int>(lane);
    if (kSync) __syncwarp();
    out[lane] = tile[(lane + 1) % 32];
}
int64_t handed_on(int* out, void* stream) { return launch(hand_on<true>, dim3(1), dim3(32), stream, out); }
int64_t handed_on_without_sync(int* out, void* stream) {
    return launch(hand_on<false>, dim3(1), dim3(32), stream, out);
}

// Lane 3 reads what lane 2 wrote, in a warp where some lanes wait for each other: those two; through lane 9, for which
// each waits; others; or lane 3 alone. Or lane 7 writes what lanes 5 and 6 read: they wait, or lane 6 does.
enum Waiting { kBoth, kThroughAnother, kOthers, kAlone, kReaders, kOneReader };

template <Waiting kWho>
__global__ void wait_for_some(int* out) {
    FP_SHARED(int, value, 1);
    const unsigned lane = threadIdx.x;
    if (lane == 2) value[0] = 102;
    if (kWho == kBoth && (lane == 2 || lane == 3)) __syncwarp(0x00cu);
    if (kWho == kThroughAnother && (lane == 2 || lane == 9)) __syncwarp(0x204u);
    if (kWho == kThroughAnother && (lane == 3 || lane == 9)) __syncwarp(0x208u);
    if (kWho == kOthers && lane < 2) __syncwarp(0x003u);
    if (kWho == kAlone && lane == 3) __syncwarp(0x008u);
    if (kWho < kReaders) {
        if (lane == 3) out[0] = value[0];
        return;
    }
    __syncwarp();
    if (lane == 5 || lane == 6) out[lane] = value[0];
    if (kWho == kReaders && (lane == 5 || lane == 6 || lane == 7)) __syncwarp(0x0e0u);
    if (kWho == kOneReader && (lane == 6 || lane == 7)) __syncwarp(0x0c0u);
    if (lane == 7) value[0] = 107;
}
int64_t waits_for_writer(int* out, void* stream) {
    return launch(wait_for_some<kBoth>, dim3(1), dim3(32), stream, out);
}
int64_t waits_through_another(int* out, void* stream) {
    return launch(wait_for_some<kThroughAnother>, dim3(1), dim3(32), stream, out);
}
int64_t waits_for_readers(int* out, void* stream) {
    return launch(wait_for_some<kReaders>, dim3(1), dim3(32), stream, out);
}
int64_t others_wait(int* out, void* stream) { return launch(wait_for_some<kOthers>, dim3(1), dim3(32), stream, out); }
int64_t waits_alone(int* out, void* stream) { return launch(wait_for_some<kAlone>, dim3(1), dim3(32), stream, out); }
int64_t waits_for_one_reader(int* out, void* stream) {
    return launch(wait_for_some<kOneReader>, dim3(1), dim3(32), stream, out);
}

enum Fault { kLaneAtBarrier, kMasksDiffer, kAbsentLane, kNotInMask, kEndedLane };

template <Fault kFault>
__global__ void fault(int* out) {
    const int lane = static_cast<int>(threadIdx.x);
    if (kFault == kEndedLane && lane == 9) return;
    if (kFault == kLaneAtBarrier && lane == 9) {
        __syncthreads();
        return;
    }
    unsigned mask = kAll;
    if (kFault == kMasksDiffer && lane < 16) mask = 0x0001ffffu;
    if (kFault == kAbsentLane) mask = lane < 16 ? 0x0000ffffu : 0xffff0000u;
    if (kFault == kNotInMask) mask = 0x0000ffffu;
    out[lane] = __shfl_sync(mask, lane, kFault == kAbsentLane ? 20 : 0);
}
int64_t shuffle_with_lane_at_barrier(int* out, void* stream) {
    return launch(fault<kLaneAtBarrier>, dim3(1), dim3(32), stream, out);
}
int64_t shuffle_with_different_masks(int* out, void* stream) {
    return launch(fault<kMasksDiffer>, dim3(1), dim3(32), stream, out);
}
int64_t shuffle_from_absent_lane(int* out, void* stream) {
    return launch(fault<kAbsentLane>, dim3(1), dim3(32), stream, out);
}
int64_t shuffle_outside_mask(int* out, void* stream) {
    return launch(fault<kNotInMask>, dim3(1), dim3(32), stream, out);
}
int64_t shuffle_without_ended_lane(int* out, void* stream) {
    return launch(fault<kEndedLane>, dim3(1), dim3(32), stream, out);
}

FP_KERNEL(exchanges);
FP_KERNEL(warp_sums);
FP_KERNEL(handed_on);
FP_KERNEL(handed_on_without_sync);
FP_KERNEL(waits_for_writer);
FP_KERNEL(waits_through_another);
FP_KERNEL(waits_for_readers);
FP_KERNEL(others_wait);
FP_KERNEL(waits_alone);
FP_KERNEL(waits_for_one_reader);
FP_KERNEL(shuffle_with_lane_at_barrier);
FP_KERNEL(shuffle_with_different_masks);
FP_KERNEL(shuffle_from_absent_lane);
FP_KERNEL(shuffle_outside_mask);
FP_KERNEL(shuffle_without_ended_lane);

}  // namespace

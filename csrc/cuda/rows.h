// SPDX-License-Identifier: Apache-2.0
// Rows dealt to teams of threads: the threads of one threadIdx.y. A short row's team is a warp, four to a block; a
// long row has the whole block.
#pragma once
#include "cuda/launch.h"

namespace {

constexpr int kMaxTeam = 512;  // threads
constexpr int kTeams = 4;      // of one warp, in a block

// Vectors of a tensor's row that a thread holds, loaded all at once. Single elements come one at a time: theirs is the
// path of odd sizes, not of speed.
template <int V>
constexpr int kHeld = V == 1 ? 1 : 4;

// Launches kernel(arguments) on rows of D elements, in vectors of V.
template <int V, class K, class A>
int64_t launch_rows(K kernel, int64_t rows, int64_t D, void* stream, const A& arguments) {
    if (rows == 0 || D == 0) return 0;
    const int64_t held = V * kHeld<V>, warps = (D + held * 32 - 1) / (held * 32);
    const int64_t team = warps < kMaxTeam / 32 ? warps * 32 : kMaxTeam;
    const int64_t teams = team == 32 ? kTeams : 1;
    const dim3 block(static_cast<unsigned>(team), static_cast<unsigned>(teams));
    return launch(kernel, dim3(limit_blocks((rows + teams - 1) / teams)), block, stream, arguments);
}

__device__ __forceinline__ int64_t first_row() { return static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; }
__device__ __forceinline__ int64_t row_step() { return static_cast<int64_t>(gridDim.x) * blockDim.y; }

// A thread's share of a row of D elements: kHeld vectors at a time, in as many parts as that takes, mostly one.
template <int V>
struct Share {
    int count;  // vectors in the row
    int parts;

    __device__ __forceinline__ explicit Share(int64_t D) : count(static_cast<int>(D / V)) {
        const int held = kHeld<V> * static_cast<int>(blockDim.x);
        parts = (count + held - 1) / held;
    }

    // The thread's vector number j in a part; there is none if that is not below count.
    __device__ __forceinline__ int at(int part, int j) const {
        return static_cast<int>(threadIdx.x) + (part * kHeld<V> + j) * static_cast<int>(blockDim.x);
    }
};

// The sum of `value` over the team, the same bits in each of its threads and in every run. All of them must call.
__device__ __forceinline__ float team_sum(float value) {
#pragma unroll
    for (int other = 16; other > 0; other /= 2) value += __shfl_xor_sync(0xffffffffu, value, other);
    if (blockDim.x == 32) return value;
    FP_SHARED(float, warp_sum, kMaxTeam / 32);
    __syncthreads();  // all have read the sums of the row before
    if (threadIdx.x % 32 == 0) warp_sum[threadIdx.x / 32] = value;
    __syncthreads();
    float sum = 0.0f;
    for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) sum += warp_sum[warp];
    return sum;
}

}  // namespace

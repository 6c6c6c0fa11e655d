// SPDX-License-Identifier: Apache-2.0
// Rows dealt to teams of threads: the threads of one threadIdx.y. A short row's team is a warp, four to a block; a
// long row has the whole block.
#pragma once
#include "cuda/launch.h"

namespace {

constexpr int kMaxTeam = 256;  // threads
constexpr int kTeamsPerBlock = 4;

struct RowLaunch {
    dim3 grid, block;
};

// For rows of `vectors` vectors, of which a thread should hold at most `held` at a time.
inline RowLaunch row_launch(int64_t rows, int64_t vectors, int64_t held) {
    const int64_t warps = (vectors + held * 32 - 1) / (held * 32);
    const int64_t team = warps < kMaxTeam / 32 ? warps * 32 : kMaxTeam;
    const int64_t teams = team == 32 ? kTeamsPerBlock : 1;
    const int64_t blocks = (rows + teams - 1) / teams;
    return {dim3(static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks)),
            dim3(static_cast<unsigned>(team), static_cast<unsigned>(teams))};
}

__device__ __forceinline__ int64_t first_row() { return static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; }
__device__ __forceinline__ int64_t row_step() { return static_cast<int64_t>(gridDim.x) * blockDim.y; }

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

// SPDX-License-Identifier: Apache-2.0
// Elementwise kernels: every thread strides over the tensor, taking kStep neighbours a turn.
#pragma once
#include "cuda/launch.h"

namespace {

constexpr int kElementThreads = 256;

template <class K, class A>
int64_t launch_elements(K kernel, int64_t count, int64_t step, void* stream, const A& arguments) {
    if (count == 0) return 0;
    const int64_t per_block = step * kElementThreads;
    return launch(kernel, dim3(limit_blocks((count + per_block - 1) / per_block)), dim3(kElementThreads), stream,
                  arguments);
}

__device__ __forceinline__ int64_t first_element(int64_t step) {
    return (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * step;
}
__device__ __forceinline__ int64_t element_stride(int64_t step) {
    return static_cast<int64_t>(gridDim.x) * blockDim.x * step;
}

}  // namespace

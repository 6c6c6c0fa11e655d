// SPDX-License-Identifier: Apache-2.0
// How a kernel is written and launched, so that one .cu source serves nvcc and the tests' host emulation
// (tests/emulation): kernels go through launch(), and shared memory through the macro below.
#pragma once
#ifdef FP_EMULATE
#include "emulate.h"
#else
#include <cuda_runtime.h>

// COUNT elements of type T in the block's shared memory. Uninitialised.
#define FP_SHARED(T, NAME, COUNT) __shared__ T NAME[COUNT]

namespace {

// Plenty for any GPU: a kernel strides over the work that is left. The emulation's limit is small, so that its tests
// take those turns.
constexpr int64_t kMaxBlocks = int64_t{1} << 20;

template <class T>
struct Itself {
    using type = T;
};

// Returns the launch's error code, 0 for success: what every native CUDA function hands back to Python.
template <class... P>
int64_t launch(void (*kernel)(P...), dim3 grid, dim3 block, void* stream, typename Itself<P>::type... arguments) {
    void* addresses[] = {&arguments..., nullptr};
    return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, addresses, 0,
                            static_cast<cudaStream_t>(stream));
}

}  // namespace
#endif

namespace {

inline unsigned limit_blocks(int64_t blocks) {
    return static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks);
}

}  // namespace

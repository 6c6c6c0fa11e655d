// SPDX-License-Identifier: Apache-2.0
// How a kernel is launched, so that one .cu source serves nvcc and the tests' host emulation (tests/emulation).
#pragma once
#ifdef FP_EMULATE
#include "emulate.h"
#else
#include <cuda_runtime.h>

namespace {

// Returns the launch's error code, 0 for success: what every native CUDA function hands back to Python.
template <class... P, class... A>
int64_t launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, void* stream, A... arguments) {
    kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
    return static_cast<int64_t>(cudaGetLastError());
}

}  // namespace
#endif

// SPDX-License-Identifier: Apache-2.0
// CUDA's words that need no GPU: qualifiers, vector types, arithmetic, and the host calls that launch code makes.
// Add here what a new kernel uses.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(BYTES) alignas(BYTES)

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) int2 {
    int x, y;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(16) float4 {
    float x, y, z, w;
};

using std::max;
using std::min;

// The build turns contraction off, so each of these rounds once.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __frsqrt_rn(float a) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(a))); }
inline float rsqrtf(float a) { return __frsqrt_rn(a); }

template <class T>
T __ldg(const T* address) {
    return *address;
}

// One operating-system thread runs all threads, and switches between them only where they wait: plain code is atomic.
template <class T>
T atomicAdd(T* address, T value) {
    const T before = *address;
    *address = before + value;
    return before;
}
template <class T>
T atomicMax(T* address, T value) {
    const T before = *address;
    *address = std::max(before, value);
    return before;
}
template <class T>
T atomicCAS(T* address, T expected, T value) {
    const T before = *address;
    if (before == expected) *address = value;
    return before;
}

enum cudaError_t : int { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };

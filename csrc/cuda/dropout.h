// SPDX-License-Identifier: Apache-2.0
// Dropout of a vector: the mask is common/philox.h's, by flat element index.
#pragma once
#include "common/philox.h"
#include "cuda/launch.h"

namespace {

struct Dropout {
    const int64_t* seed;  // [1] on the device; null: everything is kept
    uint32_t threshold;
    float scale;
};

inline Dropout make_dropout(const int64_t* seed, double p) {
    if (seed == nullptr || p <= 0.0) return {nullptr, 0, 1.0f};
    return {seed, drop_threshold(p), keep_scale(p)};
}

// The seed, read once per thread.
struct DropoutKey {
    const Dropout& dropout;
    const uint64_t seed;

    __device__ __forceinline__ explicit DropoutKey(const Dropout& dropout)
        : dropout(dropout), seed(dropout.seed == nullptr ? 0 : static_cast<uint64_t>(*dropout.seed)) {}

    // Whether element i of a block, in [0, 8), is kept. Not word[i / 2]: an array indexed at run time would live in
    // local memory.
    __device__ __forceinline__ bool keeps(const fp::PhiloxBlock& block, uint64_t i) const {
        const uint32_t even = i < 4 ? block.word[0] : block.word[2], odd = i < 4 ? block.word[1] : block.word[3];
        const uint32_t word = i % 4 < 2 ? even : odd;
        return (i % 2 == 0 ? word & 0xffffu : word >> 16) >= dropout.threshold;
    }

    // __fmul_rn is never fused with a later addition: every backend rounds alike.
    __device__ __forceinline__ float scaled(float value) const { return __fmul_rn(value, dropout.scale); }
};

// `index` is the first element's flat index, a multiple of V: one block serves all.
template <int V>
__device__ __forceinline__ void drop(float (&value)[V], const DropoutKey& key, int64_t index) {
    static_assert(8 % V == 0, "a vector lies in one block");
    if (key.dropout.seed == nullptr) return;
    const fp::PhiloxBlock block = philox(key.seed, static_cast<uint64_t>(index) / 8);
    const uint64_t first = index % 8 & ~(V - 1);  // a multiple of V, as the compiler then knows
#pragma unroll
    for (int k = 0; k < V; ++k) value[k] = key.keeps(block, first + k) ? key.scaled(value[k]) : 0.0f;
}

}  // namespace

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
    return {p > 0.0 ? seed : nullptr, drop_threshold(p), keep_scale(p)};
}

// The seed, read once per thread.
struct DropoutKey {
    const Dropout& dropout;
    const uint64_t seed;

    __device__ __forceinline__ explicit DropoutKey(const Dropout& dropout)
        : dropout(dropout), seed(dropout.seed == nullptr ? 0 : static_cast<uint64_t>(*dropout.seed)) {}
};

// Not word[i]: an array indexed at run time would live in local memory.
__device__ __forceinline__ uint32_t word_at(const fp::PhiloxBlock& block, uint64_t i) {
    const uint32_t low = i == 0 ? block.word[0] : block.word[1], high = i == 2 ? block.word[2] : block.word[3];
    return i < 2 ? low : high;
}

// `index` is the first element's flat index, a multiple of V.
template <int V>
__device__ __forceinline__ void drop(float (&value)[V], const DropoutKey& key, int64_t index) {
    if (key.dropout.seed == nullptr) return;
#pragma unroll
    for (int k = 0; k < V; k += 4) {
        const fp::PhiloxBlock block = philox(key.seed, static_cast<uint64_t>(index + k) / 4);
#pragma unroll
        for (int m = k; m < k + 4 && m < V; ++m) {
            const uint32_t word = V == 1 ? word_at(block, index % 4) : block.word[m - k];
            // __fmul_rn is never fused with a later addition: every backend rounds alike.
            value[m] = word >= key.dropout.threshold ? __fmul_rn(value[m], key.dropout.scale) : 0.0f;
        }
    }
}

}  // namespace

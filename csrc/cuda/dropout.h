// SPDX-License-Identifier: Apache-2.0
// Dropout of a thread's vectors of a row: the mask is common/philox.h's, by flat element index.
#pragma once
#include "common/philox.h"
#include "cuda/vector.h"

namespace {

struct Dropout {
    const int64_t* seed;  // [1] on the device; null: everything is kept
    uint32_t threshold;
    float scale;
};

inline Dropout make_dropout(const int64_t* seed, double p) {
    return {p > 0.0 ? seed : nullptr, drop_threshold(p), keep_scale(p)};
}

// Not block.word[i]: an array indexed at run time would live in local memory.
__device__ __forceinline__ uint32_t word_at(const fp::PhiloxBlock& block, uint64_t i) {
    const uint32_t low = i == 0 ? block.word[0] : block.word[1], high = i == 2 ? block.word[2] : block.word[3];
    return i < 2 ? low : high;
}

// `start` is the flat index of the row's first element, a multiple of 4 unless V = 1.
template <int V, int C>
__device__ __forceinline__ void drop(float (&value)[C][V], const Dropout& dropout, int64_t start, const Columns& columns) {
    if (dropout.seed == nullptr) return;
    const uint64_t seed = static_cast<uint64_t>(*dropout.seed);
#pragma unroll
    for (int j = 0; j < C; ++j) {
        if (!columns.has(j)) continue;
        const uint64_t index = static_cast<uint64_t>(start) + static_cast<uint64_t>(columns[j]) * V;
#pragma unroll
        for (int k = 0; k < V; k += 4) {
            const fp::PhiloxBlock block = philox(seed, (index + k) / 4);
#pragma unroll
            for (int m = 0; m < (V == 1 ? 1 : 4); ++m) {
                const uint32_t word = V == 1 ? word_at(block, index % 4) : block.word[m];
                // __fmul_rn: never fused with a later addition, so that every backend rounds alike.
                value[j][k + m] = word >= dropout.threshold ? __fmul_rn(value[j][k + m], dropout.scale) : 0.0f;
            }
        }
    }
}

}  // namespace

// SPDX-License-Identifier: Apache-2.0
// relu_dropout on the CPU: one pass, and one bit per element to come back by. Formulas: fastprompt/ops/relu_dropout.py.
#include <string.h>

#include "common/kernel.h"
#include "common/philox.h"
#include "cpu/dropout.h"
#include "cpu/lanes.h"
#include "cpu/memory.h"
#include "cpu/simd.h"

namespace {

static_assert(kChunk % 8 == 0, "a chunk's bits fill whole bytes");

// Bits [at, at + count) of a chunk, which begins at a byte: a vector's worth, or one if vectors are single elements.
FP_INLINE void put_bits(uint8_t* bytes, int64_t at, uint32_t bits, int64_t count) {
    if constexpr (kLanes >= 8) {
        memcpy(bytes + at / 8, &bits, static_cast<size_t>(count + 7) / 8);
    } else {
        const uint32_t byte = bits << (at % 8);
        bytes[at / 8] = static_cast<uint8_t>(at % 8 == 0 ? byte : bytes[at / 8] | byte);
    }
}

FP_INLINE uint32_t get_bits(const uint8_t* bytes, int64_t at, int64_t count) {
    if constexpr (kLanes >= 8) {
        uint32_t bits = 0;
        memcpy(&bits, bytes + at / 8, static_cast<size_t>(count + 7) / 8);
        return bits;
    } else {
        return static_cast<uint32_t>(bytes[at / 8]) >> (at % 8);
    }
}

FP_INLINE int64_t count_of(Whole) { return kLanes; }
FP_INLINE int64_t count_of(Part part) { return part.count; }

int64_t relu_dropout(const void* x, const int64_t* seed, void* y, uint8_t* kept, int64_t count, double dropout_p,
                     int64_t dtype, void* /*stream*/) {
    if (!is_dtype(dtype)) return fp::kBadOption;
    const Dropout dropout(seed, dropout_p);
    const Put how = put_in_passing(dropout.active());
    with_type(dtype, [&](auto type) {
        using T = decltype(type);
        each_chunk_parallel(count, [&](int64_t first, int64_t size) {
            const T* xs = static_cast<const T*>(x) + first;
            T* ys = static_cast<T*>(y) + first;
            with_factors(dropout, first, size, [&](const auto& factor_at) {
                each_vector(size, [&](int64_t i, auto extent) {
                    const vfloat value = load_at(xs, i, extent), factor = factor_at(i, extent);
                    const auto stops = (value <= 0.0f) | (factor == 0.0f);  // NaN passes, as in torch
                    store_at(ys, i, extent, stops ? vfloat{} : value * factor, how);
                    put_bits(kept + first / 8, i, lane_bits(bit_cast<vuint>(~stops)), count_of(extent));
                });
            });
        });
    });
    return 0;
}

int64_t relu_dropout_backward(const void* dy, const uint8_t* kept, void* dx, int64_t count, double dropout_p,
                              int64_t dtype, void* /*stream*/) {
    if (!is_dtype(dtype)) return fp::kBadOption;
    const float scale = keep_scale(dropout_p);
    const Put how = put_in_passing(false);
    with_type(dtype, [&](auto type) {
        using T = decltype(type);
        each_chunk_parallel(count, [&](int64_t first, int64_t size) {
            const T* dys = static_cast<const T*>(dy) + first;
            T* dxs = static_cast<T*>(dx) + first;
            each_vector(size, [&](int64_t i, auto extent) {
                const vuint passes = lane_mask(get_bits(kept + first / 8, i, count_of(extent)));
                store_at(dxs, i, extent, passes != 0u ? load_at(dys, i, extent) * scale : vfloat{}, how);
            });
        });
    });
    return 0;
}

FP_KERNEL(relu_dropout);
FP_KERNEL(relu_dropout_backward);

}  // namespace

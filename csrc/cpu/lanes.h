// SPDX-License-Identifier: Apache-2.0
// What crosses lanes: shuffles, transposed matrices, sums and the largest over a vector, lanes as bits.
#pragma once
#include <stdint.h>
#include <string.h>

#include "cpu/simd.h"

namespace {

// Lane i of the result is lane From::at(i) of a and, behind it, b. (Of one lane, which nothing shuffles, it is some
// lane.)
#if defined(__clang__)
template <class T, T... lane>
struct LaneNumbers {};

template <class From, int... lane>
FP_INLINE vfloat shuffle(vfloat a, vfloat b, LaneNumbers<int, lane...>) {
    return __builtin_shufflevector(a, b, (From::at(lane) % (2 * FP_LANES))...);
}

template <class From>
FP_INLINE vfloat shuffle(vfloat a, vfloat b) {
    return shuffle<From>(a, b, __make_integer_seq<LaneNumbers, int, FP_LANES>{});
}
#else
template <class From>
FP_INLINE vfloat shuffle(vfloat a, vfloat b) {
    vint from{};  // known to the compiler
    for (int lane = 0; lane < FP_LANES; ++lane) from[lane] = From::at(lane);
    return __builtin_shuffle(a, b, from);
}
#endif

// Within each four lanes kSize of a and kSize of b by turns: of their lower half, or of their upper.
template <int kSize, bool kUpper>
struct Zip {
    static constexpr int at(int lane) {
        const int part = lane % 4 / kSize, first = lane / 4 * 4 + kUpper * 2;
        return first + part / 2 * kSize + lane % kSize + part % 2 * FP_LANES;
    }
};

template <int kSize, bool kUpper>
FP_INLINE vfloat zip(vfloat a, vfloat b) {
    return shuffle<Zip<kSize, kUpper>>(a, b);
}

// Four lanes at a time: every other four of a, then of b, from the first or the second on.
template <bool kSecond>
struct EveryOtherFour {
    static constexpr int kOfEach = FP_LANES < 8 ? 1 : FP_LANES / 8;
    static constexpr int at(int lane) {
        const int four = lane / 4;
        return (four % kOfEach * 2 + kSecond) * 4 + lane % 4 + four / kOfEach * FP_LANES;
    }
};

// The same address, from which the compiler computes no other: it would keep those of all rows of a loop, most of them
// in memory.
template <class T>
FP_INLINE const T* forget_origin(const T* address) {
    __asm__("" : "+r"(address));
    return address;
}

// turned[i], lane j = from[j][i], kLanes each way: four columns of four rows within each four lanes, which are then
// brought together. Shuffles across all lanes would be as many; a Zen 4 takes twice as long for one.
template <class T>
FP_INLINE void turn(const T* from, int64_t from_row, vfloat* turned) {
    constexpr int64_t kFours = kLanes / 4;
    for (int64_t four = 0; four < kFours; ++four) {
        vfloat row[4];
        for (int64_t i = 0; i < 4; ++i) row[i] = load(from + i * from_row);
        from = forget_origin(from + 4 * from_row);
        const vfloat low[] = {zip<1, false>(row[0], row[1]), zip<1, false>(row[2], row[3])};
        const vfloat high[] = {zip<1, true>(row[0], row[1]), zip<1, true>(row[2], row[3])};
        turned[4 * four] = zip<2, false>(low[0], low[1]);
        turned[4 * four + 1] = zip<2, true>(low[0], low[1]);
        turned[4 * four + 2] = zip<2, false>(high[0], high[1]);
        turned[4 * four + 3] = zip<2, true>(high[0], high[1]);
    }
    for (int64_t apart = 1; apart < kFours; apart *= 2) {
        vfloat mixed[kLanes];
        for (int64_t four = 0; four < kFours; four += 2) {
            for (int64_t i = 0; i < 4; ++i) {
                const vfloat first = turned[4 * four + i], second = turned[4 * four + 4 + i];
                mixed[2 * four + i] = shuffle<EveryOtherFour<false>>(first, second);
                mixed[2 * four + i + kLanes / 2] = shuffle<EveryOtherFour<true>>(first, second);
            }
        }
        memcpy(turned, mixed, sizeof(mixed));
    }
    if constexpr (FP_LANES < 4) turned[0] = load(from);
}

// to[i][j] = from[j][i], kLanes each way.
template <class T>
FP_INLINE void transpose(const T* from, int64_t from_row, float* to, int64_t to_row) {
    vfloat turned[kLanes];
    turn(from, from_row, turned);
    for (int64_t i = 0; i < kLanes; ++i) store(to + i * to_row, turned[i]);
}

// The first `count` lanes of value, `other` in those behind them.
FP_INLINE vfloat first_lanes(vfloat value, int64_t count, float other) {
    vuint lane{};  // 0, 1, 2, ...: known to the compiler
    for (int64_t i = 0; i < kLanes; ++i) lane[i] = static_cast<uint32_t>(i);
    return lane < static_cast<uint32_t>(count) ? value : splat(other);
}

// Neighbouring halves are joined until one lane is left.
FP_INLINE float sum_lanes(vfloat value) {
#if FP_LANES == 16 && defined(__AVX512F__)
    return _mm512_reduce_add_ps(bit_cast<__m512>(value));
#else
    float lane[kLanes];
    memcpy(lane, &value, sizeof(lane));
    for (int64_t width = kLanes / 2; width > 0; width /= 2) {
        for (int64_t i = 0; i < width; ++i) lane[i] += lane[i + width];
    }
    return lane[0];
#endif
}

// to[j] = the sum of the lanes of value[j].
FP_INLINE void sum_lanes_of_four(const vfloat* value, float* to) {
    if constexpr (FP_LANES < 4) {
        for (int64_t j = 0; j < 4; ++j) to[j] = sum_lanes(value[j]);
    } else {
        const vfloat even = zip<1, false>(value[0], value[2]) + zip<1, true>(value[0], value[2]);  // 0 2 0 2
        const vfloat odd = zip<1, false>(value[1], value[3]) + zip<1, true>(value[1], value[3]);
        const vfloat all = zip<1, false>(even, odd) + zip<1, true>(even, odd);  // 0 1 2 3
        using quad = float __attribute__((vector_size(16)));
        quad part[kLanes / 4];
        memcpy(part, &all, sizeof(all));
        for (int64_t width = kLanes / 8; width > 0; width /= 2) {
            for (int64_t i = 0; i < width; ++i) part[i] += part[i + width];
        }
        memcpy(to, part, sizeof(quad));
    }
}

FP_INLINE float largest_lane(vfloat value) {
#if FP_LANES == 16 && defined(__AVX512F__)
    return _mm512_reduce_max_ps(bit_cast<__m512>(value));
#else
    float lane[kLanes];
    memcpy(lane, &value, sizeof(lane));
    for (int64_t width = kLanes / 2; width > 0; width /= 2) {
        for (int64_t i = 0; i < width; ++i) lane[i] = lane[i] > lane[i + width] ? lane[i] : lane[i + width];
    }
    return lane[0];
#endif
}

// A bit per lane, that of lane 0 lowest; the lanes of `mask` are all bits or none.
FP_INLINE uint32_t lane_bits(vuint mask) {
#if FP_LANES == 16 && defined(__AVX512DQ__)
    return _mm512_movepi32_mask(bit_cast<__m512i>(mask));
#elif FP_LANES == 8 && defined(__AVX2__)
    return static_cast<uint32_t>(_mm256_movemask_ps(bit_cast<__m256>(mask)));
#else
    uint32_t bits = 0;
    for (int64_t i = 0; i < kLanes; ++i) bits |= (mask[i] & 1u) << i;
    return bits;
#endif
}

// The inverse of lane_bits.
FP_INLINE vuint lane_mask(uint32_t bits) {
    vuint lane_bit{};  // 1, 2, 4, ...: known to the compiler
    for (int64_t i = 0; i < kLanes; ++i) lane_bit[i] = 1u << i;
    return bit_cast<vuint>((lane_bit & bits) != 0u);
}

}  // namespace

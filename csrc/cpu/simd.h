// SPDX-License-Identifier: Apache-2.0
// FP_LANES floats at a time (1 scalar, 8 AVX2, 16 AVX-512) in GCC's portable vector types, so that one kernel source
// serves every instruction set. Included by the files of csrc/cpu, each of which is compiled once per target.
//
// Only C headers and intrinsics are included, and everything has internal linkage: see common/kernel.h.
#pragma once
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "common/dtype.h"
#include "common/philox.h"

namespace {

constexpr int64_t kLanes = FP_LANES;

using vfloat = float __attribute__((vector_size(FP_LANES * 4)));
using vuint = uint32_t __attribute__((vector_size(FP_LANES * 4)));
using vushort = uint16_t __attribute__((vector_size(FP_LANES * 2)));
using vulong = uint64_t __attribute__((vector_size(FP_LANES * 8)));

template <class To, class From>
FP_INLINE To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
    To to;
    memcpy(&to, &from, sizeof(to));
    return to;
}

FP_INLINE vfloat splat(float value) { return vfloat{} + value; }

FP_INLINE vfloat load(const float* from) {
    vfloat value;
    memcpy(&value, from, sizeof(value));
    return value;
}

FP_INLINE vfloat load(const fp::bf16* from) {
    vushort bits;
    memcpy(&bits, from, sizeof(bits));
    return bit_cast<vfloat>(__builtin_convertvector(bits, vuint) << 16);
}

FP_INLINE vfloat load(const fp::fp16* from) {
#if FP_LANES == 8 && defined(__F16C__)
    return bit_cast<vfloat>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#elif FP_LANES == 16 && defined(__AVX512F__)
    return bit_cast<vfloat>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#else
    vfloat value;
    for (int64_t i = 0; i < kLanes; ++i) value[i] = to_float(from[i]);
    return value;
#endif
}

FP_INLINE void store(float* to, vfloat value) { memcpy(to, &value, sizeof(value)); }

FP_INLINE void store(fp::bf16* to, vfloat value) {
    const vuint bits = bit_cast<vuint>(value);
    const vuint rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const vuint nan = vuint{} + 0x7fc0u;
    const vushort narrow = __builtin_convertvector((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded, vushort);
    memcpy(to, &narrow, sizeof(narrow));
}

FP_INLINE void store(fp::fp16* to, vfloat value) {
#if FP_LANES == 8 && defined(__F16C__)
    const __m128i narrow = _mm256_cvtps_ph(bit_cast<__m256>(value), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), narrow);
#elif FP_LANES == 16 && defined(__AVX512F__)
    const __m256i narrow = _mm512_cvtps_ph(bit_cast<__m512>(value), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), narrow);
#else
    for (int64_t i = 0; i < kLanes; ++i) to[i] = from_float<fp::fp16>(value[i]);
#endif
}

// The first `count` < kLanes elements; the other lanes are zero.
template <class T>
FP_INLINE vfloat load_some(const T* from, int64_t count) {
    vfloat value{};
    for (int64_t i = 0; i < kLanes - 1 && i < count; ++i) value[i] = to_float(from[i]);
    return value;
}

template <class T>
FP_INLINE void store_some(T* to, vfloat value, int64_t count) {
    for (int64_t i = 0; i < kLanes - 1 && i < count; ++i) to[i] = from_float<T>(value[i]);
}

// Visits a row of D elements: body(offset, whole vector?, count), where count < kLanes only for the last, partial
// vector. Spelled as load_at/store_at so that a kernel writes its arithmetic once.
template <class T>
FP_INLINE vfloat load_at(const T* row, int64_t offset, int64_t D) {
    return offset + kLanes <= D ? load(row + offset) : load_some(row + offset, D - offset);
}

template <class T>
FP_INLINE void store_at(T* row, int64_t offset, int64_t D, vfloat value) {
    if (offset + kLanes <= D) {
        store(row + offset, value);
    } else {
        store_some(row + offset, value, D - offset);
    }
}

// Sums over a row in 32 partial sums (element i goes to partial i % 32), whatever the width of the vectors: short
// chains keep the error small, and every instruction set gets the same bits.
struct RowSum {
    static constexpr int kPartials = 32;
    static constexpr int kVectors = kPartials / FP_LANES;
    vfloat partial[kVectors] = {};

    // term(offset) is the vector of terms at [offset, offset + kLanes), zero past D.
    template <class Term>
    FP_INLINE float over(int64_t D, const Term& term) {
        for (int64_t block = 0; block < D; block += kPartials) {
            for (int v = 0; v < kVectors; ++v) {
                const int64_t offset = block + v * kLanes;
                if (offset < D) partial[v] += term(offset);
            }
        }
        float sums[kPartials];
        memcpy(sums, partial, sizeof(sums));
        for (int width = kPartials / 2; width > 0; width /= 2) {
            for (int i = 0; i < width; ++i) sums[i] += sums[i + width];
        }
        return sums[0];
    }
};

FP_INLINE void multiply(vulong a, uint32_t b, vulong* high, vulong* low) {
#if FP_LANES == 16 && defined(__AVX512F__)
    const __m512i factor = _mm512_set1_epi64(b);
    __m512i half[2];
    memcpy(half, &a, sizeof(half));
    for (__m512i& part : half) part = _mm512_mul_epu32(part, factor);
    vulong product;
    memcpy(&product, half, sizeof(half));
#elif FP_LANES == 8 && defined(__AVX2__)
    const __m256i factor = _mm256_set1_epi64x(b);
    __m256i half[2];
    memcpy(half, &a, sizeof(half));
    for (__m256i& part : half) part = _mm256_mul_epu32(part, factor);
    vulong product;
    memcpy(&product, half, sizeof(half));
#else
    const vulong product = a * b;
#endif
    *high = product >> 32;
    *low = product & 0xffffffffu;
}

// Multiplies values by the dropout mask's 0 or `scale`: element i of the tensor is kept when its Philox word >=
// threshold.
class Dropout {
public:
    Dropout(const int64_t* seed, double p)
        : active_(seed != nullptr && p > 0.0),
          seed_(active_ ? static_cast<uint64_t>(*seed) : 0),
          threshold_(drop_threshold(p)),
          scale_(keep_scale(p)) {}

    bool active() const { return active_; }

    // factors[i] for elements [first, first + count) of the tensor.
    void factors(int64_t first, int64_t count, float* factors) const {
        int64_t done = 0;
        uint32_t words[4 * FP_LANES];
        for (uint64_t block = static_cast<uint64_t>(first) / 4; done < count; block += FP_LANES) {
            words_of(block, words);
            const int64_t skip = done == 0 ? first % 4 : 0;
            for (int64_t i = skip; i < 4 * kLanes && done < count; ++i, ++done) {
                factors[done] = words[i] >= threshold_ ? scale_ : 0.0f;
            }
        }
    }

private:
    // The words of blocks [block, block + kLanes), in element order.
    void words_of(uint64_t block, uint32_t* words) const {
        vulong counter;
        for (int64_t i = 0; i < kLanes; ++i) counter[i] = block + static_cast<uint64_t>(i);
        vulong c0 = counter & 0xffffffffu, c1 = counter >> 32, c2{}, c3{};
        uint32_t k0 = static_cast<uint32_t>(seed_), k1 = static_cast<uint32_t>(seed_ >> 32);
        for (int round = 0; round < 10; ++round) {
            vulong high0, low0, high2, low2;
            multiply(c0, 0xD2511F53u, &high0, &low0);
            multiply(c2, 0xCD9E8D57u, &high2, &low2);
            c0 = high2 ^ c1 ^ k0;
            c1 = low2;
            c2 = high0 ^ c3 ^ k1;
            c3 = low0;
            k0 += 0x9E3779B9u;
            k1 += 0xBB67AE85u;
        }
        for (int64_t i = 0; i < kLanes; ++i) {
            words[4 * i] = static_cast<uint32_t>(c0[i]);
            words[4 * i + 1] = static_cast<uint32_t>(c1[i]);
            words[4 * i + 2] = static_cast<uint32_t>(c2[i]);
            words[4 * i + 3] = static_cast<uint32_t>(c3[i]);
        }
    }

    bool active_;
    uint64_t seed_;
    uint32_t threshold_;
    float scale_;
};

// Calls visit(T{}) with the storage type of `dtype`; false for an unknown code.
template <class Visit>
FP_INLINE bool with_type(int64_t dtype, const Visit& visit) {
    switch (dtype) {
        case fp::kFloat32: visit(float{}); return true;
        case fp::kBFloat16: visit(fp::bf16{}); return true;
        case fp::kFloat16: visit(fp::fp16{}); return true;
        default: return false;
    }
}

FP_INLINE int64_t size_of(int64_t dtype) { return dtype == fp::kFloat32 ? 4 : 2; }

// Below this many elements a second thread costs more than it brings.
constexpr int64_t kParallelElements = 16384;

}  // namespace

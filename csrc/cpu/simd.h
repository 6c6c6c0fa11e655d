// SPDX-License-Identifier: Apache-2.0
// FP_LANES floats at a time (1 scalar, 4 NEON, 8 AVX2, 16 AVX-512) in GCC's portable vector types, so that one kernel
// source serves every instruction set: vectors, their loads and stores, arithmetic, and loops over rows. Included by
// the files of csrc/cpu, each of which is compiled once per target.
//
// Only C headers and intrinsics are included, and everything has internal linkage: see common/kernel.h.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__F16C__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#include "common/dtype.h"

namespace {

constexpr int64_t kLanes = FP_LANES;

using vfloat = float __attribute__((vector_size(FP_LANES * 4)));
using vuint = uint32_t __attribute__((vector_size(FP_LANES * 4)));
using vint = int32_t __attribute__((vector_size(FP_LANES * 4)));
using vushort = uint16_t __attribute__((vector_size(FP_LANES * 2)));

template <class To, class From>
FP_INLINE To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
    To to;
    memcpy(&to, &from, sizeof(to));
    return to;
}

// One instruction, where GCC 12 converts a vector in halves.
FP_INLINE vuint widen(vushort narrow) {
#if FP_LANES == 16 && defined(__AVX512F__)
    return bit_cast<vuint>(_mm512_cvtepu16_epi32(bit_cast<__m256i>(narrow)));
#elif FP_LANES == 8 && defined(__AVX2__)
    return bit_cast<vuint>(_mm256_cvtepu16_epi32(bit_cast<__m128i>(narrow)));
#else
    return __builtin_convertvector(narrow, vuint);
#endif
}

// Of lanes below 2^16.
FP_INLINE vushort shorten(vuint wide) {
#if FP_LANES == 16 && defined(__AVX512F__)
    return bit_cast<vushort>(_mm512_cvtepi32_epi16(bit_cast<__m512i>(wide)));
#elif FP_LANES == 8 && defined(__AVX2__)
    const auto lanes = bit_cast<__m256i>(wide);
    const auto packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(lanes, lanes), 0b1000);
    return bit_cast<vushort>(_mm256_castsi256_si128(packed));
#else
    return __builtin_convertvector(wide, vushort);
#endif
}

FP_INLINE vfloat load(const float* from) {
    vfloat value;
    memcpy(&value, from, sizeof(value));
    return value;
}

FP_INLINE vfloat load(const fp::bf16* from) {
    vushort bits;
    memcpy(&bits, from, sizeof(bits));
    return bit_cast<vfloat>(widen(bits) << 16);
}

FP_INLINE vfloat load(const fp::fp16* from) {
#if FP_LANES == 8 && defined(__F16C__)
    return bit_cast<vfloat>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#elif FP_LANES == 16 && defined(__AVX512F__)
    return bit_cast<vfloat>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#elif FP_LANES == 4 && defined(__ARM_NEON)
    return bit_cast<vfloat>(vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(from)))));
#else
    vfloat value;
    for (int64_t i = 0; i < kLanes; ++i) value[i] = to_float(from[i]);
    return value;
#endif
}

// A vector of T, as it lies in memory.
template <class T>
FP_INLINE auto pack(vfloat value);

template <>
FP_INLINE auto pack<float>(vfloat value) {
    return value;
}

template <>
FP_INLINE auto pack<fp::bf16>(vfloat value) {
    const vuint bits = bit_cast<vuint>(value);
    const vuint rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return shorten(value != value ? vuint{} + 0x7fc0u : rounded);  // a quiet NaN for any NaN
}

template <>
FP_INLINE auto pack<fp::fp16>(vfloat value) {
#if FP_LANES == 8 && defined(__F16C__)
    const auto narrow = _mm256_cvtps_ph(bit_cast<__m256>(value), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return bit_cast<vushort>(narrow);
#elif FP_LANES == 16 && defined(__AVX512F__)
    const auto narrow = _mm512_cvtps_ph(bit_cast<__m512>(value), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return bit_cast<vushort>(narrow);
#elif FP_LANES == 4 && defined(__ARM_NEON)
    return bit_cast<vushort>(vcvt_f16_f32(bit_cast<float32x4_t>(value)));
#else
    vushort narrow;
    for (int64_t i = 0; i < kLanes; ++i) narrow[i] = from_float<fp::fp16>(value[i]).bits;
    return narrow;
#endif
}

template <class T>
FP_INLINE void store(T* to, vfloat value) {
    const auto packed = pack<T>(value);
    memcpy(to, &packed, sizeof(packed));
}

// All lanes equal. Subtracting zero changes no value, so the compiler leaves it out; adding would turn -0 into 0.
FP_INLINE vfloat splat(float value) { return value - vfloat{}; }

// a * b + c, rounded once where the machine can.
FP_INLINE vfloat fused_multiply_add(vfloat a, vfloat b, vfloat c) {
#if FP_LANES == 16 && defined(__AVX512F__)
    return bit_cast<vfloat>(_mm512_fmadd_ps(bit_cast<__m512>(a), bit_cast<__m512>(b), bit_cast<__m512>(c)));
#elif FP_LANES == 8 && defined(__FMA__)
    return bit_cast<vfloat>(_mm256_fmadd_ps(bit_cast<__m256>(a), bit_cast<__m256>(b), bit_cast<__m256>(c)));
#elif FP_LANES == 4 && defined(__ARM_NEON)
    return bit_cast<vfloat>(vfmaq_f32(bit_cast<float32x4_t>(c), bit_cast<float32x4_t>(a), bit_cast<float32x4_t>(b)));
#else
    return a * b + c;
#endif
}

// A row of D elements is visited in vectors: those inside the row, and the last, partial one. The extent is a type, so
// that the loop over whole vectors carries no branch for the other.
struct Whole {};
struct Part {
    int64_t count;  // of elements, fewer than a vector has
};

// body(offset, extent) for each vector of a row.
template <class Body>
FP_INLINE void each_vector(int64_t D, const Body& body) {
    int64_t d = 0;
    for (; d + kLanes <= D; d += kLanes) body(d, Whole{});
    if (d < D) body(d, Part{D - d});
}

template <class T>
FP_INLINE vfloat load_at(const T* row, int64_t offset, Whole) {
    vfloat value = load(row + offset);
#if FP_LANES == 16 && defined(__AVX512F__)
    // GCC would make a select that follows part of the load, and on a Zen 5 no masked load starts reading ahead.
    __asm__("" : "+v"(value));
#endif
    return value;
}

// The lanes past the row are zero.
template <class T>
FP_INLINE vfloat load_at(const T* row, int64_t offset, Part part) {
    T elements[kLanes] = {};
    memcpy(elements, row + offset, static_cast<size_t>(part.count) * sizeof(T));
    return load(elements);
}

// Floats of a row that a kernel buffers at a time, on the stack. A multiple of RowSum's partial sums.
constexpr int64_t kChunk = 1024;

// body(begin, count) for each chunk of a row of D elements.
template <class Body>
FP_INLINE void each_chunk(int64_t D, const Body& body) {
    for (int64_t begin = 0; begin < D; begin += kChunk) body(begin, D - begin < kChunk ? D - begin : kChunk);
}

// Sums over a row in 32 partial sums (element i goes to partial i % 32), whatever the width of the vectors: short
// chains keep the error small, and every instruction set gets the same bits.
struct RowSum {
    static constexpr int kPartials = 32;
    static constexpr int kVectors = kPartials / FP_LANES;
    vfloat partial[kVectors] = {};

    // Adds `count` terms of the row; term(offset, extent) is the vector of those there, zero past the last. All calls
    // but the last add a multiple of kPartials.
    template <class Term>
    FP_INLINE void add(int64_t count, const Term& term) {
        int64_t block = 0;
        for (; block + kPartials <= count; block += kPartials) {
            for (int v = 0; v < kVectors; ++v) partial[v] += term(block + v * kLanes, Whole{});
        }
        for (vfloat* sum = partial; block < count; block += kLanes, ++sum) {
            *sum += block + kLanes <= count ? term(block, Whole{}) : term(block, Part{count - block});
        }
    }

    FP_INLINE float total() const {
        float sums[kPartials];
        memcpy(sums, partial, sizeof(sums));
        for (int width = kPartials / 2; width > 0; width /= 2) {
            for (int i = 0; i < width; ++i) sums[i] += sums[i + width];
        }
        return sums[0];
    }
};

// Calls visit(T{}) with the storage type of a valid `dtype`.
template <class Visit>
FP_INLINE void with_type(int64_t dtype, const Visit& visit) {
    switch (dtype) {
        case fp::kFloat32: return visit(float{});
        case fp::kBFloat16: return visit(fp::bf16{});
        default: return visit(fp::fp16{});
    }
}

FP_INLINE bool is_dtype(int64_t dtype) { return dtype >= fp::kFloat32 && dtype <= fp::kFloat16; }

// Below this many elements a second thread costs more than it brings; of weights that are only read, below so many.
constexpr int64_t kParallelElements = 16384, kParallelWeights = 1 << 18;

// each_chunk over `count` elements, shared out among the threads.
template <class Body>
FP_INLINE void each_chunk_parallel(int64_t count, const Body& body) {
#pragma omp parallel for schedule(static) if (count >= kParallelElements)
    for (int64_t begin = 0; begin < count; begin += kChunk)
        body(begin, count - begin < kChunk ? count - begin : kChunk);
}

}  // namespace

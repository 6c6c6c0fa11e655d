// SPDX-License-Identifier: Apache-2.0
// FP_LANES floats at a time (1 scalar, 4 NEON, 8 AVX2, 16 AVX-512) in GCC's portable vector types, so that one kernel
// source serves every instruction set. Included by the files of csrc/cpu, each of which is compiled once per target.
//
// Only C headers and intrinsics are included, and everything has internal linkage: see common/kernel.h.
#pragma once
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__F16C__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#include "common/dtype.h"
#include "common/philox.h"

namespace {

constexpr int64_t kLanes = FP_LANES;

FP_INLINE constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

FP_INLINE constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

using vfloat = float __attribute__((vector_size(FP_LANES * 4)));
using vuint = uint32_t __attribute__((vector_size(FP_LANES * 4)));
using vint = int32_t __attribute__((vector_size(FP_LANES * 4)));
using vushort = uint16_t __attribute__((vector_size(FP_LANES * 2)));

// The same address, from which the compiler computes no other: it would keep those of all rows of a loop, most of them
// in memory.
template <class T>
FP_INLINE const T* forget_origin(const T* address) {
    __asm__("" : "+r"(address));
    return address;
}

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

// Streaming stores write whole lines past the caches, without reading them first. They pay once the output outgrows a
// core's share of the last-level cache: its reader then finds it in memory anyway (docs/performance-notes.md).
constexpr int64_t kLine = 64;               // bytes
constexpr int64_t kStreamBytes = 16 << 20;  // of output

FP_INLINE bool streams(const void* to, int64_t row_bytes, int64_t rows) {
    return FP_LANES > 1 && reinterpret_cast<uintptr_t>(to) % kLine == 0 && row_bytes % kLine == 0 &&
           row_bytes * rows >= kStreamBytes;
}

// Memory that begins at a line, to be freed; null if there is none.
FP_INLINE void* allocate_lines(int64_t bytes) {
    return aligned_alloc(kLine, static_cast<size_t>(round_up(bytes, kLine)));
}

template <class Packed>
FP_INLINE void stream(void* to, Packed value) {
#if defined(__AVX512F__)
    if constexpr (sizeof(value) == 64) return _mm512_stream_si512(static_cast<__m512i*>(to), bit_cast<__m512i>(value));
#endif
#if defined(__AVX2__)
    if constexpr (sizeof(value) == 32) return _mm256_stream_si256(static_cast<__m256i*>(to), bit_cast<__m256i>(value));
    if constexpr (sizeof(value) == 16) return _mm_stream_si128(static_cast<__m128i*>(to), bit_cast<__m128i>(value));
#endif
    memcpy(to, &value, sizeof(value));
}

// Streaming stores become visible to other threads only after this.
FP_INLINE void stream_fence() {
#if defined(__AVX2__)
    _mm_sfence();
#endif
}

// Starts reading what is needed soon. Scalar loops go without: a request per element costs more than it brings.
template <class T>
FP_INLINE void fetch(const T* address) {
    if constexpr (FP_LANES > 1) __builtin_prefetch(address);
}

// The same into the second-level cache alone, for what would drive out of the first what is needed before.
template <class T>
FP_INLINE void fetch_outer(const T* address) {
    if constexpr (FP_LANES > 1) __builtin_prefetch(address, 0, 2);
}

// A store waits in a buffer of few entries until its line is in the cache. So lines that are to be written are asked
// for, too, so many bytes before.
constexpr int64_t kStoreAhead = 2048;

// How a kernel stores its results.
enum class Put {
    kAsking,     // for their lines, ahead
    kPlain,      // without
    kStreaming,  // past the caches
};

// The best for a kernel that does little but read and write, unless it draws. AMD's CPUs write whole lines without
// reading them first: a Zen 5 loses up to a quarter of its speed by asking, where a Xeon gains as much.
FP_INLINE Put put_in_passing(bool draws) {
#if defined(__x86_64__)
    if (!draws && __builtin_cpu_is("amd") != 0) return Put::kPlain;
#endif
    return Put::kAsking;
}

FP_INLINE Put put_rows(const void* to, int64_t row_bytes, int64_t rows, Put otherwise = Put::kAsking) {
    return streams(to, row_bytes, rows) ? Put::kStreaming : otherwise;
}

// A row of D elements is visited in vectors: those inside the row, and the last, partial one. The extent is a type, so
// that the loop over whole vectors carries no branch for the other.
struct Whole {};
struct Part {
    int64_t count;  // of elements, below kLanes
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

template <class T>
FP_INLINE void store_at(T* row, int64_t offset, Whole, vfloat value, Put how = Put::kAsking) {
    if (how == Put::kStreaming) return stream(row + offset, pack<T>(value));
    if (how == Put::kAsking) fetch(row + offset + kStoreAhead / static_cast<int64_t>(sizeof(T)));
    store(row + offset, value);
}

template <class T>
FP_INLINE void store_at(T* row, int64_t offset, Part part, vfloat value, Put /*how*/ = Put::kAsking) {
    T elements[kLanes];
    store(elements, value);
    memcpy(row + offset, elements, static_cast<size_t>(part.count) * sizeof(T));
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

// Philox words, one in the low half of each 64-bit lane; the high halves are never read.
constexpr int64_t kBlocks = FP_LANES > 1 ? FP_LANES / 2 : 1;
using vwords = uint64_t __attribute__((vector_size(kBlocks * 8)));

FP_INLINE vwords multiply(vwords a, uint32_t b) {
#if FP_LANES == 16 && defined(__AVX512F__)
    return bit_cast<vwords>(_mm512_mul_epu32(bit_cast<__m512i>(a), _mm512_set1_epi64(b)));
#elif FP_LANES == 8 && defined(__AVX2__)
    return bit_cast<vwords>(_mm256_mul_epu32(bit_cast<__m256i>(a), _mm256_set1_epi64x(b)));
#elif FP_LANES == 4 && defined(__ARM_NEON)
    return bit_cast<vwords>(vmull_u32(vmovn_u64(bit_cast<uint64x2_t>(a)), vdup_n_u32(b)));
#else
    return (a & 0xffffffffu) * b;
#endif
}

// a's low halves, and b's in front of them.
FP_INLINE vwords pair(vwords a, vwords b) {
#if FP_LANES == 16 && defined(__AVX512F__)
    return bit_cast<vwords>(
        _mm512_mask_shuffle_epi32(bit_cast<__m512i>(a), 0xaaaa, bit_cast<__m512i>(b), _MM_PERM_CCAA));
#else
    return (a & 0xffffffffu) | (b << 32);
#endif
}

// a0 b0 a1 b1 ...
FP_INLINE void interleave(vwords a, vwords b, vuint* to) {
#if FP_LANES == 16 && defined(__AVX512F__)
    const auto low = bit_cast<__m512i>(a), high = bit_cast<__m512i>(b);
    to[0] = bit_cast<vuint>(_mm512_permutex2var_epi64(low, _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11), high));
    to[1] = bit_cast<vuint>(_mm512_permutex2var_epi64(low, _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15), high));
#elif FP_LANES == 8 && defined(__AVX2__)
    const __m256i even = _mm256_unpacklo_epi64(bit_cast<__m256i>(a), bit_cast<__m256i>(b));  // a0 b0 a2 b2
    const __m256i odd = _mm256_unpackhi_epi64(bit_cast<__m256i>(a), bit_cast<__m256i>(b));   // a1 b1 a3 b3
    to[0] = bit_cast<vuint>(_mm256_permute2x128_si256(even, odd, 0x20));
    to[1] = bit_cast<vuint>(_mm256_permute2x128_si256(even, odd, 0x31));
#elif FP_LANES == 4 && defined(__ARM_NEON)
    to[0] = bit_cast<vuint>(vzip1q_u64(bit_cast<uint64x2_t>(a), bit_cast<uint64x2_t>(b)));
    to[1] = bit_cast<vuint>(vzip2q_u64(bit_cast<uint64x2_t>(a), bit_cast<uint64x2_t>(b)));
#else
    auto* bytes = reinterpret_cast<char*>(to);
    for (int64_t i = 0; i < kBlocks; ++i) {
        memcpy(bytes + 16 * i, reinterpret_cast<const char*>(&a) + 8 * i, 8);
        memcpy(bytes + 16 * i + 8, reinterpret_cast<const char*>(&b) + 8 * i, 8);
    }
#endif
}

// All lanes equal. Subtracting zero changes no value, so the compiler leaves it out; adding would turn -0 into 0.
FP_INLINE vfloat splat(float value) { return value - vfloat{}; }

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

// e^r for r within ln 2 / 2 of zero: Cephes' polynomial.
FP_INLINE vfloat exp_of_small(vfloat r) {
    vfloat p = splat(1.9875691500e-4f);
    for (const float coefficient :
         {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) {
        p = fused_multiply_add(p, r, splat(coefficient));
    }
    return fused_multiply_add(p, r * r, r) + 1.0f;
}

// e^x for x of 88 or less, of which callers give none but x <= 0, to about one unit in the last place; 0 below -87,
// where it is next to the least normal number. NaN stays NaN.
FP_INLINE vfloat exp(vfloat x) {
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which the low bits then hold
    constexpr float kLog2E = 1.44269504f, kLeast = -87.0f;
    // Cody and Waite: x = n * ln 2 + r, ln 2 in two parts, the first of which is exact.
    constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
#if FP_LANES == 16 && defined(__AVX512F__)
    const __m512 bounded = _mm512_min_ps(_mm512_set1_ps(89.0f), bit_cast<__m512>(x));  // the second if one is NaN
    const vfloat n = fused_multiply_add(bit_cast<vfloat>(bounded), splat(kLog2E), splat(kRound)) - kRound;
    const vfloat rest = fused_multiply_add(n, splat(-kLn2High), bit_cast<vfloat>(bounded));
    const vfloat p = exp_of_small(fused_multiply_add(n, splat(-kLn2Low), rest));
    const __mmask16 normal = _mm512_cmp_ps_mask(bit_cast<__m512>(x), _mm512_set1_ps(kLeast), _CMP_NLT_UQ);
    return bit_cast<vfloat>(_mm512_maskz_scalef_ps(normal, bit_cast<__m512>(p), bit_cast<__m512>(n)));
#else
    const vfloat clamped = x < -88.0f ? splat(-88.0f) : x;
    const vfloat shifted = clamped * kLog2E + kRound, n = shifted - kRound;
    const vfloat p = exp_of_small(fused_multiply_add(n, splat(-kLn2Low), clamped - n * kLn2High));
    const vuint power = (bit_cast<vuint>(shifted) - float_bits(kRound) + 127u) << 23;
    vfloat result = p * bit_cast<vfloat>(power);
    result = x < kLeast ? vfloat{} : result;
    result = x > 88.0f ? splat(INFINITY) : result;
    return x != x ? x : result;
#endif
}

// Dropped means zero: an infinity times a factor of 0 would leave a NaN.
FP_INLINE vfloat drop(vfloat value, vfloat factor) { return factor != 0.0f ? value * factor : vfloat{}; }

// Dropout's factors, 0 or `scale`: an element is kept when its half-word of common/philox.h >= drop_threshold(p).
class Dropout {
    // Groups of blocks computed side by side: one alone would wait for its own multiplications.
    static constexpr int64_t kChains = 2;
    static constexpr int64_t kPerBlock = 8;

public:
    static constexpr int64_t kDrawn = kPerBlock * kBlocks * kChains;  // elements at once

    Dropout(const int64_t* seed, double p)
        : active_(seed != nullptr && p > 0.0),
          threshold_(static_cast<uint16_t>(drops_all(p) ? 0xffff : drop_threshold(p))),
          scale_(drops_all(p) ? 0.0f : keep_scale(p)) {
        const uint64_t key = active_ ? static_cast<uint64_t>(*seed) : 0;
        for (uint32_t round = 0; round < fp::kPhiloxRounds; ++round) {
            keys_[round][0] = static_cast<uint32_t>(key) + round * 0x9E3779B9u;
            keys_[round][1] = static_cast<uint32_t>(key >> 32) + round * 0xBB67AE85u;
        }
    }

    bool active() const { return active_; }
    float scale() const { return scale_; }  // of what is kept

    // factors[i] for elements [first, first + count) of the tensor. `stream` is the counter's third word.
    void factors(int64_t first, int64_t count, float* factors, uint32_t stream = 0) const {
        const uint16_t threshold = threshold_;  // copies, which no store can change
        const float scale = scale_;
        uint64_t block = static_cast<uint64_t>(first) / kPerBlock;
        for (int64_t i = -(first % kPerBlock); i < count; i += kDrawn, block += kBlocks * kChains) {
            vuint words[4 * kBlocks * kChains / kLanes];
            words_of(block, stream, words);
            float edge[kDrawn];
            const bool inside = i >= 0 && i + kDrawn <= count;
            float* to = inside ? factors + i : edge;
            for (int64_t k = 0; k < kDrawn / kLanes; ++k) store(to + k * kLanes, factor(words, k, threshold, scale));
            if (!inside) {
                const int64_t begin = i < 0 ? -i : 0, end = count - i < kDrawn ? count - i : kDrawn;
                memcpy(factors + i + begin, edge + begin, static_cast<size_t>(end - begin) * sizeof(float));
            }
        }
    }

private:
    static bool drops_all(double p) { return drop_threshold(p) > 0xffff; }

    // The factors of the elements [k * kLanes, (k + 1) * kLanes).
    FP_INLINE static vfloat factor(const vuint* words, int64_t k, uint16_t threshold, float scale) {
#if FP_LANES == 16 && defined(__AVX512BW__)
        const auto least = _mm512_set1_epi16(static_cast<int16_t>(threshold));
        const __mmask32 keep = _mm512_cmpge_epu16_mask(bit_cast<__m512i>(words[k / 2]), least);
        const auto half = static_cast<__mmask16>(k % 2 == 0 ? keep : keep >> 16);
        return bit_cast<vfloat>(_mm512_maskz_mov_ps(half, _mm512_set1_ps(scale)));
#else
        vushort halves;
        memcpy(&halves, reinterpret_cast<const char*>(words) + k * static_cast<int64_t>(sizeof(halves)),
               sizeof(halves));
        const auto keep = bit_cast<vuint>(bit_cast<vint>(widen(halves)) > threshold - 1);  // all bits or none
        return bit_cast<vfloat>(keep & float_bits(scale));
#endif
    }

    // The words of blocks [block, block + kBlocks * kChains), in element order.
    FP_INLINE void words_of(uint64_t block, uint32_t stream, vuint* words) const {
        vwords c0[kChains], c1[kChains], c2[kChains], c3[kChains] = {};
        for (int64_t chain = 0; chain < kChains; ++chain) {
            vwords lane{};  // 0, 1, 2, ...: known to the compiler
            for (int64_t i = 0; i < kBlocks; ++i) lane[i] = static_cast<uint64_t>(i);
            const vwords counter = lane + (block + static_cast<uint64_t>(chain * kBlocks));
            c0[chain] = counter;
            c1[chain] = counter >> 32;
            c2[chain] = vwords{} + stream;
        }
        for (const auto& key : keys_) {
            for (int64_t chain = 0; chain < kChains; ++chain) {
                const vwords product0 = multiply(c0[chain], 0xD2511F53u), product2 = multiply(c2[chain], 0xCD9E8D57u);
                c0[chain] = (product2 >> 32) ^ c1[chain] ^ key[0];
                c1[chain] = product2;
                c2[chain] = (product0 >> 32) ^ c3[chain] ^ key[1];
                c3[chain] = product0;
            }
        }
        for (int64_t chain = 0; chain < kChains; ++chain) {
            interleave(pair(c0[chain], c1[chain]), pair(c2[chain], c3[chain]), words + chain * 4 * kBlocks / kLanes);
        }
    }

    bool active_;
    uint16_t threshold_;  // 0xffff with a scale of 0, where everything is dropped
    float scale_;
    uint64_t keys_[fp::kPhiloxRounds][2];  // of each round; 64 bits wide for the lanes
};

// run(factor) for the elements [first, first + size) of a tensor, size at most kChunk: factor(i, extent) is dropout's
// factors of a vector of them, 1 where nothing is dropped.
template <class Run>
FP_INLINE void with_factors(const Dropout& dropout, int64_t first, int64_t size, const Run& run) {
    if (!dropout.active()) return run([](int64_t, auto) { return splat(1.0f); });
    float factors[kChunk] = {};
    dropout.factors(first, size, factors);
    run([&](int64_t i, auto extent) { return load_at(factors, i, extent); });
}

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

FP_INLINE int64_t size_of(int64_t dtype) { return dtype == fp::kFloat32 ? 4 : 2; }

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

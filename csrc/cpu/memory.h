// SPDX-License-Identifier: Apache-2.0
// How results reach memory, and how what is needed soon reaches the caches: streaming stores and prefetching.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "common/integers.h"
#include "cpu/simd.h"

#if defined(__AVX512F__)
#include <cpuid.h>
#endif

namespace {

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

#if defined(__AVX512F__)
// AMD's family 19h, of which a Zen 4 alone has AVX-512. Asked of CPUID, as older compilers do not know its name, and
// once, as a virtual machine may take microseconds to answer.
inline bool is_zen4() {
    static const bool found = [] {
        unsigned a = 0, b = 0, c = 0, d = 0;
        if (__builtin_cpu_is("amd") == 0 || __get_cpuid(1, &a, &b, &c, &d) == 0) return false;
        return (a >> 8 & 0xF) + (a >> 20 & 0xFF) == 0x19;
    }();
    return found;
}
#endif

// The best for a kernel that does little but read and write. AMD's CPUs write whole lines without reading them first: a
// Zen 5 loses up to a quarter of its speed by asking, where a Xeon gains as much. Where a kernel draws, too, a Zen 5
// gains by asking; a Zen 4 does not.
FP_INLINE Put put_in_passing(bool draws) {
#if defined(__AVX512F__)
    if (draws && is_zen4()) return Put::kPlain;
#endif
#if defined(__x86_64__)
    if (!draws && __builtin_cpu_is("amd") != 0) return Put::kPlain;
#endif
    return Put::kAsking;
}

FP_INLINE Put put_rows(const void* to, int64_t row_bytes, int64_t rows, Put otherwise = Put::kAsking) {
    return streams(to, row_bytes, rows) ? Put::kStreaming : otherwise;
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

}  // namespace

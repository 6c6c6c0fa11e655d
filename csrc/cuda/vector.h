// SPDX-License-Identifier: Apache-2.0
// V neighbouring elements, moved at once and converted to float.
//
// V = 8: two-byte types, 16 bytes. V = 4: any type, 16 or 8 bytes. V = 1: odd sizes and unaligned pointers.
//
// A kernel is compiled for the mix of types that matters most, one type for all tensors (Mix: a DType), and once for
// all other mixes (kMixed). There the types are run-time arguments: a uniform branch or two per vector, where templates
// on three types would need 27 instances.
#pragma once
#include <type_traits>

#include "common/dtype.h"
#include "cuda/launch.h"

namespace {

constexpr int kMixed = -1;

template <int Mix>
FP_INLINE fp::DType type_of(fp::DType runtime) {
    return Mix == kMixed ? runtime : static_cast<fp::DType>(Mix);
}

inline fp::DType dtype(int64_t code) { return static_cast<fp::DType>(code); }

struct Operand {
    const void* address;  // null: absent
    fp::DType type;
};

template <int N>
constexpr std::integral_constant<int, N> constant = {};

// Calls function(V, Mix) for the widest vectors that rows of D elements allow, the first of which begin at the
// operands.
template <size_t COUNT, class F>
int64_t with_vectors(int64_t D, const Operand (&operands)[COUNT], F function) {
    const fp::DType type = operands[0].type;
    bool same = true, four = D % 4 == 0, eight = D % 8 == 0;
    for (const Operand& operand : operands) {
        if (operand.address == nullptr) continue;
        const uintptr_t address = reinterpret_cast<uintptr_t>(operand.address), bytes = size_of(operand.type);
        same = same && operand.type == type;
        four = four && address % (4 * bytes) == 0;
        eight = eight && address % 16 == 0;
    }
    if (eight && same && type == fp::kBFloat16) return function(constant<8>, constant<fp::kBFloat16>);
    if (eight && same && type == fp::kFloat16) return function(constant<8>, constant<fp::kFloat16>);
    if (four && same && type == fp::kFloat32) return function(constant<4>, constant<fp::kFloat32>);
    if (four) return function(constant<4>, constant<kMixed>);
    return function(constant<1>, constant<kMixed>);
}

// As it lies in memory: two elements of a two-byte type share a word. At most 16 bytes.
template <int V>
struct Vector {
    uint32_t word[V == 1 ? 1 : 4];
};

template <int V>
__device__ __forceinline__ Vector<V> load(const void* base, int64_t index, fp::DType type) {
    const char* address = static_cast<const char*>(base) + index * size_of(type);
    if constexpr (V == 1) {
        if (type == fp::kFloat32) return {{*reinterpret_cast<const uint32_t*>(address)}};
        return {{*reinterpret_cast<const uint16_t*>(address)}};
    } else if (V == 8 || type == fp::kFloat32) {
        const uint4 words = *reinterpret_cast<const uint4*>(address);
        return {{words.x, words.y, words.z, words.w}};
    } else {
        const uint2 words = *reinterpret_cast<const uint2*>(address);
        return {{words.x, words.y, 0, 0}};
    }
}

template <int V>
__device__ __forceinline__ void store(void* base, int64_t index, fp::DType type, const Vector<V>& vector) {
    char* address = static_cast<char*>(base) + index * size_of(type);
    if constexpr (V == 1) {
        if (type == fp::kFloat32) {
            *reinterpret_cast<uint32_t*>(address) = vector.word[0];
        } else {
            *reinterpret_cast<uint16_t*>(address) = static_cast<uint16_t>(vector.word[0]);
        }
    } else if (V == 8 || type == fp::kFloat32) {
        *reinterpret_cast<uint4*>(address) = {vector.word[0], vector.word[1], vector.word[2], vector.word[3]};
    } else {
        *reinterpret_cast<uint2*>(address) = {vector.word[0], vector.word[1]};
    }
}

// Two neighbours in one word, the first in its low half. A GPU rounds both with one instruction.
template <class T>
__device__ __forceinline__ uint32_t pack_pair(float first, float second) {
#if defined(__CUDA_ARCH__)
    if constexpr (std::is_same_v<T, fp::bf16>) {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
        return __bfloat16_as_ushort(pair.x) | static_cast<uint32_t>(__bfloat16_as_ushort(pair.y)) << 16;
    } else {
        const __half2 pair = __floats2half2_rn(first, second);
        return __half_as_ushort(pair.x) | static_cast<uint32_t>(__half_as_ushort(pair.y)) << 16;
    }
#else
    return from_float<T>(first).bits | static_cast<uint32_t>(from_float<T>(second).bits) << 16;
#endif
}

template <class T, int V>
__device__ __forceinline__ Vector<V> pack_pairs(const float (&from)[V]) {
    Vector<V> vector = {};
#pragma unroll
    for (int k = 0; k < V; k += 2) vector.word[k / 2] = pack_pair<T>(from[k], V == 1 ? 0.0f : from[k + 1]);
    return vector;
}

template <class T, int V>
__device__ __forceinline__ void unpack_pairs(const Vector<V>& vector, float (&to)[V]) {
#pragma unroll
    for (int k = 0; k < V; ++k) to[k] = to_float(T{static_cast<uint16_t>(vector.word[k / 2] >> (k % 2 * 16))});
}

template <int V>
__device__ __forceinline__ void unpack(const Vector<V>& vector, fp::DType type, float (&to)[V]) {
    if (type == fp::kBFloat16) {
        unpack_pairs<fp::bf16>(vector, to);
    } else if (type == fp::kFloat16) {
        unpack_pairs<fp::fp16>(vector, to);
    } else if constexpr (V < 8) {
#pragma unroll
        for (int k = 0; k < V; ++k) to[k] = bits_float(vector.word[k]);
    }
}

// Rounds to nearest even.
template <int V>
__device__ __forceinline__ Vector<V> pack(const float (&from)[V], fp::DType type) {
    if (type == fp::kBFloat16) return pack_pairs<fp::bf16>(from);
    if (type == fp::kFloat16) return pack_pairs<fp::fp16>(from);
    Vector<V> vector = {};
    if constexpr (V < 8) {
#pragma unroll
        for (int k = 0; k < V; ++k) vector.word[k] = float_bits(from[k]);
    }
    return vector;
}

}  // namespace

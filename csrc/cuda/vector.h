// SPDX-License-Identifier: Apache-2.0
// Rows read and written in vectors of V elements whose storage type is known only at run time.
//
// The type is a kernel argument, so every branch on it is uniform and costs an instruction or two per 16 bytes moved.
// In return one instance of a kernel serves every mix of types, where templates on the types would need 27.
//
// V = 8: two-byte types only, 16 bytes. V = 4: any type, 16 or 8 bytes. V = 1: odd sizes and unaligned pointers.
#pragma once
#include "common/dtype.h"
#include "cuda/launch.h"

namespace {

struct TypedPointer {
    const void* address;
    fp::DType type;
};

constexpr int64_t type_bytes(fp::DType type) { return type == fp::kFloat32 ? 4 : 2; }

// The widest V for rows of D elements that begin at `tensors` (null ones do not count) and every D elements after.
template <size_t COUNT>
int vector_width(int64_t D, const TypedPointer (&tensors)[COUNT]) {
    for (const int V : {8, 4}) {
        bool fits = D % V == 0;
        for (const TypedPointer& tensor : tensors) {
            const int64_t bytes = V * type_bytes(tensor.type);
            if (tensor.address != nullptr) {
                fits = fits && bytes <= 16 && reinterpret_cast<uintptr_t>(tensor.address) % bytes == 0;
            }
        }
        if (fits) return V;
    }
    return 1;
}

// Calls function(std::integral_constant<int, V>).
template <class F>
int64_t with_width(int V, F function) {
    if (V == 8) return function(std::integral_constant<int, 8>());
    if (V == 4) return function(std::integral_constant<int, 4>());
    return function(std::integral_constant<int, 1>());
}

// The vectors of a row that one thread holds: number j is begin + j * step, where that is below end.
struct Columns {
    int begin, step, end;

    __device__ int operator[](int j) const { return begin + j * step; }
    __device__ bool has(int j) const { return begin + j * step < end; }
};

// C vectors of V elements as they lie in memory: two of a two-byte type share a word.
template <int V, int C>
struct Packed {
    uint32_t word[C][V == 1 ? 1 : 4];
};

__device__ __forceinline__ const char* element(const void* base, int64_t index, fp::DType type) {
    return static_cast<const char*>(base) + index * (type == fp::kFloat32 ? 4 : 2);
}

__device__ __forceinline__ char* element(void* base, int64_t index, fp::DType type) {
    return static_cast<char*>(base) + index * (type == fp::kFloat32 ? 4 : 2);
}

// The columns of the row that begins at element `start`; zeros for those past its end.
template <int V, int C>
__device__ __forceinline__ void load(Packed<V, C>& to, const void* base, int64_t start, fp::DType type,
                                     const Columns& columns) {
    const char* row = element(base, start, type);
    const bool wide = type == fp::kFloat32;
#pragma unroll
    for (int j = 0; j < C; ++j) {
        const int i = columns[j];
        if constexpr (V == 1) {
            to.word[j][0] = 0;
            if (!columns.has(j)) continue;
            to.word[j][0] = wide ? reinterpret_cast<const uint32_t*>(row)[i] : reinterpret_cast<const uint16_t*>(row)[i];
        } else {
            uint4 four = {0, 0, 0, 0};
            if (columns.has(j)) {
                if (V == 8 || wide) {
                    four = reinterpret_cast<const uint4*>(row)[i];
                } else {
                    const uint2 two = reinterpret_cast<const uint2*>(row)[i];
                    four.x = two.x, four.y = two.y;
                }
            }
            to.word[j][0] = four.x, to.word[j][1] = four.y, to.word[j][2] = four.z, to.word[j][3] = four.w;
        }
    }
}

template <int V, int C>
__device__ __forceinline__ void store(void* base, int64_t start, fp::DType type, const Columns& columns,
                                      const Packed<V, C>& from) {
    char* row = element(base, start, type);
    const bool wide = type == fp::kFloat32;
#pragma unroll
    for (int j = 0; j < C; ++j) {
        const int i = columns[j];
        if (!columns.has(j)) continue;
        if constexpr (V == 1) {
            if (wide) {
                reinterpret_cast<uint32_t*>(row)[i] = from.word[j][0];
            } else {
                reinterpret_cast<uint16_t*>(row)[i] = static_cast<uint16_t>(from.word[j][0]);
            }
        } else if (V == 8 || wide) {
            reinterpret_cast<uint4*>(row)[i] = {from.word[j][0], from.word[j][1], from.word[j][2], from.word[j][3]};
        } else {
            reinterpret_cast<uint2*>(row)[i] = {from.word[j][0], from.word[j][1]};
        }
    }
}

// Two neighbours of a two-byte type in one word, the first in the low half.
template <class T>
__device__ __forceinline__ uint32_t pack_pair(float first, float second) {
    return from_float<T>(first).bits | static_cast<uint32_t>(from_float<T>(second).bits) << 16;
}

template <class T, int V, int C>
__device__ __forceinline__ void unpack_pairs(const Packed<V, C>& from, float (&to)[C][V]) {
#pragma unroll
    for (int j = 0; j < C; ++j) {
#pragma unroll
        for (int k = 0; k < V; ++k) {
            to[j][k] = to_float(T{static_cast<uint16_t>(from.word[j][k / 2] >> (k % 2 * 16))});
        }
    }
}

template <class T, int V, int C>
__device__ __forceinline__ void pack_pairs(const float (&from)[C][V], Packed<V, C>& to) {
#pragma unroll
    for (int j = 0; j < C; ++j) {
#pragma unroll
        for (int k = 0; k < V; k += 2) to.word[j][k / 2] = pack_pair<T>(from[j][k], V == 1 ? 0.0f : from[j][k + 1]);
    }
}

template <int V, int C>
__device__ __forceinline__ void unpack(const Packed<V, C>& from, fp::DType type, float (&to)[C][V]) {
    if (type == fp::kBFloat16) {
        unpack_pairs<fp::bf16>(from, to);
    } else if (type == fp::kFloat16) {
        unpack_pairs<fp::fp16>(from, to);
    } else if constexpr (V < 8) {
#pragma unroll
        for (int j = 0; j < C; ++j) {
#pragma unroll
            for (int k = 0; k < V; ++k) to[j][k] = bits_float(from.word[j][k]);
        }
    }
}

// Rounds to nearest even.
template <int V, int C>
__device__ __forceinline__ void pack(const float (&from)[C][V], fp::DType type, Packed<V, C>& to) {
    if (type == fp::kBFloat16) {
        pack_pairs<fp::bf16>(from, to);
    } else if (type == fp::kFloat16) {
        pack_pairs<fp::fp16>(from, to);
    } else if constexpr (V < 8) {
#pragma unroll
        for (int j = 0; j < C; ++j) {
#pragma unroll
            for (int k = 0; k < V; ++k) to.word[j][k] = float_bits(from[j][k]);
        }
    }
}

}  // namespace

// SPDX-License-Identifier: Apache-2.0
// The three storage types, their codes, and their conversions to and from float, on host and device.
#pragma once
#include <stdint.h>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define FP_INLINE __host__ __device__ __forceinline__
#else
#include <string.h>
#define FP_INLINE inline __attribute__((always_inline))
#endif

namespace fp {

// The codes of fastprompt/_native.py for torch.float32, torch.bfloat16 and torch.float16.
enum DType : int64_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct bf16 {
    uint16_t bits;
};
struct fp16 {
    uint16_t bits;
};

}  // namespace fp

namespace {

// Bytes of an element.
FP_INLINE int64_t size_of(int64_t dtype) { return dtype == fp::kFloat32 ? 4 : 2; }

// torch.promote_types: equal types stay, different ones meet in float32.
FP_INLINE int64_t promoted(int64_t a, int64_t b) { return a == b ? a : static_cast<int64_t>(fp::kFloat32); }

FP_INLINE uint32_t float_bits(float value) {
#if defined(__CUDA_ARCH__)
    return __float_as_uint(value);
#else
    uint32_t bits;
    __builtin_memcpy(&bits, &value, sizeof(bits));
    return bits;
#endif
}

FP_INLINE float bits_float(uint32_t bits) {
#if defined(__CUDA_ARCH__)
    return __uint_as_float(bits);
#else
    float value;
    __builtin_memcpy(&value, &bits, sizeof(value));
    return value;
#endif
}

FP_INLINE float to_float(float value) { return value; }

FP_INLINE float to_float(fp::bf16 value) { return bits_float(static_cast<uint32_t>(value.bits) << 16); }

FP_INLINE float to_float(fp::fp16 value) {
#if defined(__CUDA_ARCH__)
    return __half2float(__ushort_as_half(value.bits));
#else
    const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
    const uint32_t magnitude = value.bits & 0x7fffu;
    if (magnitude >= 0x7c00u) return bits_float(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));  // inf, nan
    // Reading exponent and mantissa as a float scales the value by 2^-112, subnormals included: scale it back.
    return bits_float(sign | float_bits(bits_float(magnitude << 13) * 0x1p112f));
#endif
}

// Round to nearest even, as torch does; a NaN stays a (quiet) NaN.
template <class T>
FP_INLINE T from_float(float value);

template <>
FP_INLINE float from_float<float>(float value) {
    return value;
}

template <>
FP_INLINE fp::bf16 from_float<fp::bf16>(float value) {
#if defined(__CUDA_ARCH__)
    return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
#else
    const uint32_t bits = float_bits(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>(0x7fc0u)};
    return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
#endif
}

template <>
FP_INLINE fp::fp16 from_float<fp::fp16>(float value) {
#if defined(__CUDA_ARCH__)
    return {__half_as_ushort(__float2half_rn(value))};
#else
    const uint32_t bits = float_bits(value);
    const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
    const uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};   // nan
    if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // rounds past 65504: inf
    if (magnitude < 0x38800000u) {
        // Below 2^-14: adding 0.5 makes the float unit round the value to a multiple of 2^-24.
        const uint32_t rounded = float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u;
        return {static_cast<uint16_t>(sign | rounded)};
    }
    const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
    return {static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13))};
#endif
}

}  // namespace

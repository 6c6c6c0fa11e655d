// SPDX-License-Identifier: Apache-2.0
// e^x of vectors.
#pragma once
#include <math.h>

#include "cpu/simd.h"

namespace {

// e^r for r within ln 2 / 2 of zero: Cephes' polynomial.
FP_INLINE vfloat exp_of_small(vfloat r) {
    vfloat p = splat(1.9875691500e-4f);
    constexpr float kOthers[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f,
                                 5.0000001201e-1f};
    for (const float coefficient : kOthers) {
        p = fused_multiply_add(p, r, splat(coefficient));
    }
    return fused_multiply_add(p, r * r, r) + 1.0f;
}

// e^x to about one unit in the last place; 0 below -87, where it is next to the least normal number, and infinity above
// 88. NaN stays NaN.
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
    return x > 88.0f ? splat(INFINITY) : result;
#endif
}

}  // namespace

// SPDX-License-Identifier: Apache-2.0
// Dropout's random bits: Philox 4x32-7 (Salmon et al. 2011), a pure function of (seed, element index). The backward
// pass therefore rebuilds the mask of the forward pass, and every backend draws the same one.
//
// Element i of a tensor takes half-word i % 8 of the block whose counter is i / 8, low halves first; the key is the
// seed. An element is kept when its half-word >= drop_threshold(p). The readable twin is fastprompt/ops/_dropout.py.
#pragma once
#include <math.h>

#include "common/dtype.h"

namespace fp {

constexpr uint32_t kPhiloxRounds = 7;

struct PhiloxBlock {
    uint32_t word[4];
};

}  // namespace fp

namespace {

FP_INLINE uint32_t mul_high(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
    return __umulhi(a, b);
#else
    return static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32);
#endif
}

// `stream` is the counter's third word.
FP_INLINE fp::PhiloxBlock philox(uint64_t seed, uint64_t counter, uint32_t stream = 0) {
    uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32), c2 = stream, c3 = 0;
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
    for (uint32_t round = 0; round < fp::kPhiloxRounds; ++round) {
        const uint32_t high0 = mul_high(0xD2511F53u, c0), high2 = mul_high(0xCD9E8D57u, c2);
        const uint32_t low0 = 0xD2511F53u * c0, low2 = 0xCD9E8D57u * c2;
        c0 = high2 ^ c1 ^ k0;
        c1 = low2;
        c2 = high0 ^ c3 ^ k1;
        c3 = low0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return {{c0, c1, c2, c3}};
}

// How many of the 65,536 half-words drop their element: p in [0, 1] to the nearest 2^-16.
FP_INLINE uint32_t drop_threshold(double p) { return static_cast<uint32_t>(nearbyint(p * 65536.0)); }

FP_INLINE float keep_scale(double p) { return p < 1.0 ? static_cast<float>(1.0 / (1.0 - p)) : 0.0f; }

}  // namespace

// SPDX-License-Identifier: Apache-2.0
// Dropout of vectors: the mask is common/philox.h's, by flat element index.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "common/philox.h"
#include "cpu/simd.h"

namespace {

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

}  // namespace

// SPDX-License-Identifier: Apache-2.0
// The products of t5_attention by instructions for bf16: of the targets "amx" (tiles.h) and "avx512_bf16" (pairs.h).
//
// Factors are bf16 and sums fp32, for bf16 only. Weights and the gradients of scores are rounded to bf16 as they become
// factors, as Hugging Face rounds them (docs/decisions/0016).
#pragma once
#include <stdint.h>
#include <string.h>

#include "common/integers.h"
#include "cpu/lanes.h"
#include "cpu/simd.h"
#include "cpu/t5_attention_products.h"
#if defined(FP_HAS_TILES)
#include "cpu/tiles.h"
#else
#include "cpu/pairs.h"
#endif

namespace {

// Subnormal numbers become zero.
FP_INLINE void store_weight(fp::bf16* to, vfloat value) {
#if FP_LANES == 16 && defined(__AVX512BF16__)
    const auto narrow = _mm512_cvtneps_pbh(bit_cast<__m512>(value));
    memcpy(to, &narrow, sizeof(narrow));
#else
    store(to, value);
#endif
}

// Rows [count][columns] in pairs: to[i / 2][column][2], zero past the last row for `filled` rows.
FP_INLINE void pair_rows(const fp::bf16* from, int64_t row, int64_t count, int64_t columns, int64_t filled,
                         fp::bf16* to) {
    const fp::bf16 zeros[256] = {};
    for (int64_t i = 0; i < filled; i += 2) {
        const fp::bf16 *even = i < count ? from + i * row : zeros, *odd = i + 1 < count ? from + (i + 1) * row : zeros;
        for (int64_t j = 0; j < columns; j += kLanes) {
            vushort low, high;
            memcpy(&low, even + j, sizeof(low));
            memcpy(&high, odd + j, sizeof(high));
            const vuint pairs = widen(low) | widen(high) << 16;
            memcpy(to + i * columns + 2 * j, &pairs, sizeof(pairs));
        }
    }
}

struct PairProducts {
    using Factor = fp::bf16;
    static bool serves(int64_t dtype) { return dtype == fp::kBFloat16; }
    static constexpr int64_t kFilled = 32;   // factors are laid out, with zeros, for so many products of a sum
    static constexpr int64_t kQueries = 96;  // a multiple of kFilled
    static constexpr int64_t kFewQueries = 16;
    static constexpr int64_t kWeights = kFilled;
    static int64_t depth(int64_t K) { return round_up(K, kFilled); }
    using Unit = ::Unit;

    class Queries {
    public:
        void cut(Arena& arena, int64_t K) {
            rows = arena.take<fp::bf16>(kQueries * depth(K));
            pairs = arena.take<fp::bf16>(kQueries * K);
            if (kTransposesSums) columns = arena.take<fp::bf16>(kQueries * K);
        }

        void lay_out(const float* from, int64_t count, int64_t K, bool transposed) const {
            for (int64_t i = 0; i < count; ++i) {
                fp::bf16* row = rows + i * depth(K);
                narrow(from + i * K, K, row);
                memset(row + K, 0, static_cast<size_t>(depth(K) - K) * sizeof(fp::bf16));
            }
            if (!transposed) return;
            pair_rows(rows, depth(K), count, K, round_up(count, kFilled), pairs);
            if (!kTransposesSums) return;
            for (int64_t i = 0; i < round_up(count, kFilled); i += 2 * kLanes) {
                for (int64_t d = 0; d < K; d += kLanes) {
                    transpose_pairs(pairs + i * K + 2 * d, K, columns + d * kQueries + i, kQueries / 2);
                }
            }
        }

        fp::bf16* rows = nullptr;     // [kQueries][depth], those past the last undefined
        fp::bf16* pairs = nullptr;    // [kQueries / 2][K][2], those past the last zero to a multiple of kFilled
        fp::bf16* columns = nullptr;  // [K][kQueries], likewise
    };

    // to[panel][d / 2][key][2]
    template <class Load>
    static void pack_panels(int64_t keys, int64_t K, const Load& load, fp::bf16* to) {
        fp::bf16 rows[kLanes * 256] = {};
        const int64_t D = depth(K);
        for (int64_t n = 0; n < round_up(keys, kPanel); n += kLanes) {
            fp::bf16* panel = to + n / kPanel * kPanel * D + n % kPanel * 2;
            for (int64_t lane = 0; lane < kLanes; ++lane) {
                if (n + lane < keys) {
                    load(n + lane, rows + lane * D);
                } else {
                    memset(rows + lane * D, 0, static_cast<size_t>(K) * sizeof(fp::bf16));
                }
            }
            for (int64_t d = 0; d < D; d += 2 * kLanes) transpose_pairs(rows + d, D / 2, panel + d * kPanel, kPanel);
        }
    }

    // to[n / 2][d][2], zero past the last row to a multiple of kFilled.
    template <class Load>
    static void pack_rows(int64_t keys, int64_t K, const Load& load, fp::bf16* to) {
        fp::bf16 two[2 * 256];
        for (int64_t n = 0; n < round_up(keys, kFilled); n += 2) {
            const int64_t count = n < keys ? (n + 1 < keys ? 2 : 1) : 0;
            for (int64_t i = 0; i < count; ++i) load(n + i, two + i * K);
            pair_rows(two, K, count, K, 2, to + n * K);
        }
    }

    static void score(const Queries& q, int64_t count, const fp::bf16* panels, int64_t width, int64_t K, float* to) {
        const int64_t D = depth(K);
        for (int64_t n = 0; n < width; n += kPanel) {
            const int64_t left = round_up(width - n, kFactorColumns), columns = left < kPanel ? left : kPanel;
            multiply(q.rows, D, round_up(count, kFactorRows), panels + n * D, 2 * kPanel, columns, to + n, kScoreRow,
                     round_up(K, kFactorDepth), false);
        }
    }

    static void sum_rows(const fp::bf16* weights, int64_t count, const fp::bf16* rows, int64_t width, int64_t K,
                         float* to) {
        multiply(weights, 2 * kScoreRow, round_up(count, kFactorRows), rows, 2 * K, K, to, K,
                 round_up(width, kFactorDepth), true);
    }

    // Gradients of keys or values. Pairs of weights are a right factor in tiles, which sum the transposed gradients,
    // and else a left one.
    class KeySums {
    public:
        void cut(Arena& arena, int64_t keys, int64_t K) {
            sums_ = arena.take<float>(keys * K);
            if (kTransposesSums) rows_ = arena.take<float>(keys * K);
            pairs_ = arena.take<fp::bf16>(kQueries * kKeys);
        }

        void clear(int64_t keys, int64_t K) {
            keys_ = round_up(keys, kFactorColumns);
            ::clear(sums_, keys_ * K);
        }

        void add(const fp::bf16* weights, int64_t count, const Queries& q, int64_t chunk, int64_t width, int64_t K) {
            const int64_t columns = round_up(width, kFactorColumns), up = round_up(count, kFactorDepth);
            pair_rows(weights, 2 * kScoreRow, count, columns, up, pairs_);
#if defined(FP_HAS_TILES)
            multiply(q.columns, kQueries, K, pairs_, 2 * columns, columns, sums_ + chunk, keys_, up, true);
#else
            multiply({pairs_, 2, 2 * columns}, width, q.pairs, 2 * K, K, sums_ + chunk * K, K, up, true);
#endif
        }

        const float* rows(int64_t K) const {
            if (!kTransposesSums) return sums_;
            for (int64_t n = 0; n < keys_; n += kLanes) {
                for (int64_t d = 0; d < K; d += kLanes) transpose(sums_ + d * keys_ + n, keys_, rows_ + n * K + d, K);
            }
            return rows_;
        }

    private:
        float *sums_ = nullptr, *rows_ = nullptr;  // [keys_][K], or [K][keys_] and [keys_][K] of transposed sums
        fp::bf16* pairs_ = nullptr;                // [kQueries / 2][width][2]
        int64_t keys_ = 0;
    };

private:
    // What came from bf16, so that nothing is lost.
    static void narrow(const float* from, int64_t count, fp::bf16* to) {
        for (int64_t d = 0; d < count; d += kLanes) {
            const vushort bits = shorten(bit_cast<vuint>(load(from + d)) >> 16);
            memcpy(to + d, &bits, sizeof(bits));
        }
    }

    // kLanes x kLanes pairs; a pair is moved as if it were a float. Rows are so many pairs apart.
    static void transpose_pairs(const fp::bf16* from, int64_t from_row, fp::bf16* to, int64_t to_row) {
        transpose(reinterpret_cast<const float*>(from), from_row, reinterpret_cast<float*>(to), to_row);
    }
};

}  // namespace

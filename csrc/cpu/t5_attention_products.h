// SPDX-License-Identifier: Apache-2.0
// The products of t5_attention on a CPU, and how their factors lie in memory:
//
// - FloatProducts: fp32, for any dtype;
// - TileProducts, of the target "amx": bf16 factors and fp32 sums, for bf16 only. Weights and the gradients of scores
//   are rounded to bf16 as they become factors, as Hugging Face rounds them (docs/decisions/0016).
#pragma once
#include "cpu/gemm.h"
#include "cpu/simd.h"
#if defined(FP_HAS_TILES)
#include "cpu/tiles.h"
#endif

namespace {

constexpr int64_t kKeys = 256;             // of a chunk
constexpr int64_t kPanel = 64;             // keys side by side in a transposed panel
constexpr int64_t kScoreRow = kKeys + 16;  // floats

FP_INLINE void clear(float* to, int64_t count) { memset(to, 0, static_cast<size_t>(count) * sizeof(float)); }

// Aligned memory of one thread, cut into pieces. Sized by a first pass over the same cuts with base null.
class Arena {
public:
    explicit Arena(char* base) : base_(base) {}
    template <class T>
    T* take(int64_t count) {
        T* piece = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
        used_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
        return piece;
    }
    int64_t used() const { return used_; }

private:
    char* base_;
    int64_t used_ = 0;
};

struct FloatProducts {
    using Factor = float;
    static bool serves(int64_t dtype) { return is_dtype(dtype); }
    static constexpr int64_t kQueries = 72;        // of a block; a multiple of kTileRows
    static constexpr int64_t kWeights = kLanes;    // a row of weights is filled up to a multiple of it
    static int64_t depth(int64_t K) { return K; }  // of a query or key as a factor
    struct Unit {};                                // what a thread needs to multiply

    // Rows of queries, or of their outputs' gradients: the left factor of scores, the right one of the keys' gradients.
    class Queries {
    public:
        void cut(Arena& /*arena*/, int64_t /*K*/) {}
        void lay_out(const float* from, int64_t /*count*/, int64_t /*K*/, bool /*transposed*/) { rows = from; }
        const float* rows = nullptr;  // [count][K]
    };

    // to[panel][d][key]: rows become columns, zero past the last. load(n, row) reads row n.
    template <class Load>
    static void pack_panels(int64_t keys, int64_t K, const Load& load, float* to) {
        float rows[kLanes * 256];
        for (int64_t n = 0; n < round_up(keys, kPanel); n += kLanes) {
            float* panel = to + n / kPanel * kPanel * K + n % kPanel;
            for (int64_t lane = 0; lane < kLanes; ++lane) {
                if (n + lane < keys) {
                    load(n + lane, rows + lane * K);
                } else {
                    clear(rows + lane * K, K);
                }
            }
            for (int64_t d = 0; d < K; d += kLanes) transpose(rows + d, K, panel + d * kPanel, kPanel);
        }
    }

    template <class Load>
    static void pack_rows(int64_t keys, int64_t K, const Load& load, float* to) {
        for (int64_t n = 0; n < keys; ++n) load(n, to + n * K);
    }

    // to[count][kScoreRow] = q times the first `width` columns of panels.
    static void score(const Queries& q, int64_t count, const float* panels, int64_t width, int64_t K, float* to) {
        for (int64_t n = 0; n < width; n += kPanel) {
            const int64_t left = round_up(width - n, kLanes), columns = left < kPanel ? left : kPanel;
            multiply({q.rows, K, 1}, count, panels + n * K, kPanel, columns, to + n, kScoreRow, K, false);
        }
    }

    // to[count][K] += weights[count][width] rows[width][K]
    static void sum_rows(const float* weights, int64_t count, const float* rows, int64_t width, int64_t K, float* to) {
        multiply({weights, kScoreRow, 1}, count, rows, K, K, to, K, width);
    }

    // Gradients of keys or values, [keys][K].
    class KeySums {
    public:
        void cut(Arena& arena, int64_t keys, int64_t K) { sums_ = arena.take<float>(keys * K); }
        void clear(int64_t keys, int64_t K) { ::clear(sums_, keys * K); }

        // sums[chunk + n] += the sum over i of weights[i][n] q[i]
        void add(const float* weights, int64_t count, const Queries& q, int64_t chunk, int64_t width, int64_t K) {
            multiply({weights, 1, kScoreRow}, width, q.rows, K, K, sums_ + chunk * K, K, count);
        }
        const float* rows(int64_t /*K*/) const { return sums_; }

    private:
        float* sums_ = nullptr;
    };
};

FP_INLINE void store_weight(float* to, vfloat value) { store(to, value); }

#if defined(FP_HAS_TILES)

// Subnormal numbers become zero.
FP_INLINE void store_weight(fp::bf16* to, vfloat value) {
#if FP_LANES == 16 && defined(__AVX512BF16__)
    const auto narrow = _mm512_cvtneps_pbh(bit_cast<__m512>(value));
    memcpy(to, &narrow, sizeof(narrow));
#else
    store(to, value);
#endif
}

struct TileProducts {
    using Factor = fp::bf16;
    static bool serves(int64_t dtype) { return dtype == fp::kBFloat16; }
    static constexpr int64_t kQueries = 96;  // a multiple of kTileDepth
    static constexpr int64_t kWeights = kTileDepth;
    static int64_t depth(int64_t K) { return round_up(K, kTileDepth); }
    using Unit = Tiles;

    class Queries {
    public:
        void cut(Arena& arena, int64_t K) {
            rows = arena.take<fp::bf16>(kQueries * depth(K));
            columns = arena.take<fp::bf16>(kQueries * K);
            pairs_ = arena.take<fp::bf16>(kQueries * K);
        }

        void lay_out(const float* from, int64_t count, int64_t K, bool transposed) const {
            const fp::bf16 zeros[256] = {};
            for (int64_t i = 0; i < count; ++i) {
                narrow(from + i * K, K, rows + i * depth(K));
                memcpy(rows + i * depth(K) + K, zeros, static_cast<size_t>(depth(K) - K) * sizeof(fp::bf16));
            }
            if (!transposed) return;
            const int64_t up = round_up(count, kTileDepth);
            for (int64_t i = 0; i < up; i += 2) {
                pair_rows(i < count ? rows + i * depth(K) : zeros, i + 1 < count ? rows + (i + 1) * depth(K) : zeros, K,
                          pairs_ + i * K);
            }
            for (int64_t i = 0; i < up; i += 2 * kLanes) {
                for (int64_t d = 0; d < K; d += kLanes) {
                    transpose_pairs(pairs_ + i * K + 2 * d, K, columns + d * kQueries + i, kQueries / 2);
                }
            }
        }

        fp::bf16* rows = nullptr;     // [kQueries][depth], those past the last undefined
        fp::bf16* columns = nullptr;  // [K][kQueries], those past the last zero to a multiple of kTileDepth

    private:
        fp::bf16* pairs_ = nullptr;  // [kQueries / 2][K][2]
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

    // to[n / 2][d][2], zero past the last row to a multiple of kTileDepth.
    template <class Load>
    static void pack_rows(int64_t keys, int64_t K, const Load& load, fp::bf16* to) {
        fp::bf16 pair[2][256];
        for (int64_t n = 0; n < round_up(keys, kTileDepth); ++n) {
            if (n < keys) {
                load(n, pair[n % 2]);
            } else {
                memset(pair[n % 2], 0, sizeof(pair[0]));
            }
            if (n % 2 == 1) pair_rows(pair[0], pair[1], K, to + (n - 1) * K);
        }
    }

    static void score(const Queries& q, int64_t count, const fp::bf16* panels, int64_t width, int64_t K, float* to) {
        const int64_t D = depth(K);
        for (int64_t n = 0; n < width; n += kPanel) {
            const int64_t left = round_up(width - n, kTile), columns = left < kPanel ? left : kPanel;
            multiply(q.rows, D, round_up(count, kTile), panels + n * D, 2 * kPanel, columns, to + n, kScoreRow, D,
                     false);
        }
    }

    static void sum_rows(const fp::bf16* weights, int64_t count, const fp::bf16* rows, int64_t width, int64_t K,
                         float* to) {
        multiply(weights, 2 * kScoreRow, round_up(count, kTile), rows, 2 * K, K, to, K, round_up(width, kTileDepth),
                 true);
    }

    // Transposed while they are summed, so that the weights need not be.
    class KeySums {
    public:
        void cut(Arena& arena, int64_t keys, int64_t K) {
            sums_ = arena.take<float>(keys * K);
            rows_ = arena.take<float>(keys * K);
            pairs_ = arena.take<fp::bf16>(kQueries * kKeys);
        }

        void clear(int64_t keys, int64_t K) {
            keys_ = round_up(keys, kPanel);
            ::clear(sums_, keys_ * K);
        }

        void add(const fp::bf16* weights, int64_t count, const Queries& q, int64_t chunk, int64_t width, int64_t K) {
            const fp::bf16 zeros[kKeys] = {};
            const int64_t columns = round_up(width, kTile), up = round_up(count, kTileDepth);
            for (int64_t i = 0; i < up; i += 2) {
                const fp::bf16* row = weights + i * 2 * kScoreRow;
                pair_rows(i < count ? row : zeros, i + 1 < count ? row + 2 * kScoreRow : zeros, columns,
                          pairs_ + i * columns);
            }
            multiply(q.columns, kQueries, K, pairs_, 2 * columns, columns, sums_ + chunk, keys_, up, true);
        }

        const float* rows(int64_t K) const {
            for (int64_t n = 0; n < keys_; n += kLanes) {
                for (int64_t d = 0; d < K; d += kLanes) transpose(sums_ + d * keys_ + n, keys_, rows_ + n * K + d, K);
            }
            return rows_;
        }

    private:
        float *sums_ = nullptr, *rows_ = nullptr;  // [K][keys_], [keys_][K]
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

using Products = TileProducts;
#else
using Products = FloatProducts;
#endif

}  // namespace

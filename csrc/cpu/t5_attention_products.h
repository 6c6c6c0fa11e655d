// SPDX-License-Identifier: Apache-2.0
// The products of t5_attention on a CPU, and how their factors lie in memory: here in fp32, for any dtype. Targets that
// multiply bf16 have PairProducts in place of FloatProducts (t5_attention_pairs.h).
#pragma once
#include <stdint.h>
#include <string.h>

#include "common/integers.h"
#include "cpu/gemm.h"
#include "cpu/lanes.h"
#include "cpu/simd.h"

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
    static constexpr int64_t kQueries = 72;  // of a block; a multiple of kTileRows
    // For so many packing takes longer than it brings. With one lane a sum would be one long chain, which multiply cuts
    // at kTileChain.
    static constexpr int64_t kFewQueries = kLanes == 16 ? 32 : kLanes > 1 ? 16 : 0;
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

}  // namespace

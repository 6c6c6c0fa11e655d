// SPDX-License-Identifier: Apache-2.0
// y = x w^T for a few rows of x and a weight whose rows are dense: what frozen_linear is made of in generation.
//
// Reading the weight is what takes time, so it passes by once, and nothing is packed or turned: a sum has a lane for
// every kLanes-th product, or pair of products, and lanes are added up at its end. The columns of y that are computed
// together lie far apart, so that each reads the weight in one line of its own, which a CPU reads ahead of. A row's
// result is the same bits whatever other rows there are.
#pragma once
#include <stdlib.h>
#include <string.h>

#include "common/integers.h"
#include "common/kernel.h"
#include "cpu/lanes.h"
#include "cpu/memory.h"
#include "cpu/simd.h"

namespace {

// How a weight of W multiplies rows of float: vectors of either, whole or with zeros past the last element.
template <class W>
struct Floats {
    using X = float;
    using Weight = W;
    static constexpr int64_t kStep = kLanes;  // elements of a vector
    static constexpr int64_t kBytesAhead = FP_LANES == 16 ? 2048 : 4096;
    // Elements of a row that are multiplied before the others, so that no lane adds up many products.
    static constexpr int64_t kDepth = FP_LANES >= 8 ? 2048 : FP_LANES > 1 ? 512 : 16;

    template <class T, class Extent>
    FP_INLINE static vfloat at(const T* from, Extent extent) {
        return load_at(from, 0, extent);
    }
    FP_INLINE static vfloat add(vfloat sum, vfloat left, vfloat right) { return fused_multiply_add(left, right, sum); }
    FP_INLINE static float joined(float y, float sum, bool adds) { return adds ? y + sum : sum; }
};

// y[M][N] = or += x[M][K] w[N][K]^T, rows of x and of w so many elements apart.
template <class Terms>
struct FewRows {
    const typename Terms::X* x;
    const typename Terms::Weight* w;
    typename Terms::X* y;
    int64_t M, N, K, x_row, w_row;
    bool adds;  // to y
};

// ROWS rows of y from m on, COLUMNS columns from n on, which lie `apart`.
template <class Terms, int64_t ROWS, int64_t COLUMNS>
void some_sums(const FewRows<Terms>& p, int64_t m, int64_t n, int64_t apart) {
    using X = typename Terms::X;
    using W = typename Terms::Weight;
    constexpr int64_t kSums = ROWS * COLUMNS, kFour = 4;
    // Elements of the weight, asked for before they are multiplied: further ahead where more rows of x may need them.
    constexpr int64_t kAhead = (ROWS < 6 ? Terms::kBytesAhead : 4096) / static_cast<int64_t>(sizeof(W));
    const X* x = p.x + m * p.x_row;
    const W* w = p.w + n * p.w_row;
    vfloat sum[round_up(kSums, kFour)] = {};
    const auto add = [&](int64_t k, auto extent) {
        decltype(Terms::at(w, extent)) right[COLUMNS];
#pragma GCC unroll 8
        for (int64_t j = 0; j < COLUMNS; ++j) {
            const W* from = w + j * apart * p.w_row + k;
            // Of one or two rows a CPU reads ahead by itself as fast as they are multiplied. Into the second-level
            // cache, as the first one waits for few lines at a time.
            if (ROWS > 2) fetch_outer(from + kAhead);
            right[j] = Terms::at(from, extent);
        }
#pragma GCC unroll 8
        for (int64_t i = 0; i < ROWS; ++i) {
            const auto left = Terms::at(x + i * p.x_row + k, extent);
#pragma GCC unroll 8
            for (int64_t j = 0; j < COLUMNS; ++j) {
                sum[i * COLUMNS + j] = Terms::add(sum[i * COLUMNS + j], left, right[j]);
            }
        }
    };
    int64_t k = 0;
    for (; k + Terms::kStep <= p.K; k += Terms::kStep) add(k, Whole{});
    if (k < p.K) add(k, Part{p.K - k});
    float sums[round_up(kSums, kFour * kLanes)] = {};
#pragma GCC unroll 8
    for (int64_t s = 0; s < kSums; s += kFour) sum_lanes_of_four(sum + s, sums + s);
    X rounded[round_up(kSums, kFour * kLanes)];
    for (int64_t s = 0; s < kSums; s += kLanes) store(rounded + s, load(sums + s));
    for (int64_t i = 0; i < ROWS; ++i) {
        for (int64_t j = 0; j < COLUMNS; ++j) {
            X& y = p.y[(m + i) * p.N + n + j * apart];
            y = Terms::joined(y, rounded[i * COLUMNS + j], p.adds);
        }
    }
}

// Rows [m, m + MOST) of y, or as many as there are.
template <int64_t MOST, int64_t COLUMNS, class Terms>
void rows_from(const FewRows<Terms>& p, int64_t m, int64_t n, int64_t apart) {
    if (p.M - m >= MOST) {
        some_sums<Terms, MOST, COLUMNS>(p, m, n, apart);
    } else if constexpr (MOST > 1) {
        rows_from<MOST - 1, COLUMNS>(p, m, n, apart);
    }
}

// COLUMNS of y at a time for MOST rows: as many sums as there are registers for. The products of B examples, whose
// weights lie w_example apart.
template <int64_t MOST, int64_t COLUMNS, class Terms>
void multiply_tiles(const FewRows<Terms>& first, int64_t B, int64_t w_example) {
    const int64_t M = first.M, N = first.N, apart = N / COLUMNS;
    const auto of_example = [=](int64_t b) {
        FewRows<Terms> p = first;
        p.x += b * M * p.x_row;
        p.w += b * w_example;
        p.y += b * M * N;
        return p;
    };
#pragma omp parallel for collapse(2) schedule(static) if (B * N * first.K >= kParallelWeights)
    for (int64_t b = 0; b < B; ++b) {
        for (int64_t n = 0; n < apart; ++n) {
            const FewRows<Terms> p = of_example(b);
            for (int64_t m = 0; m < M; m += MOST) rows_from<MOST, COLUMNS>(p, m, n, apart);
        }
    }
    for (int64_t b = 0; b < B; ++b) {
        for (int64_t n = apart * COLUMNS; n < N; ++n) {
            for (int64_t m = 0; m < M; m += MOST) rows_from<MOST, 1>(of_example(b), m, n, 0);
        }
    }
}

// What is fastest was measured (docs/performance-notes.md): with more columns fewer vectors of x are loaded per
// product, but there are more lines in which the weight is read.
template <class Terms>
void multiply_in_tiles(const FewRows<Terms>& p, int64_t B, int64_t w_example) {
    constexpr bool kHas32Registers = FP_LANES == 16 || FP_LANES == 4;
    if constexpr (kHas32Registers) {
        if (p.M <= 2) return multiply_tiles<2, 4>(p, B, w_example);
        if (p.M == 3) return multiply_tiles<3, 8>(p, B, w_example);
        return multiply_tiles<6, 4>(p, B, w_example);
    } else {
        if (p.M <= 3) return multiply_tiles<3, 4>(p, B, w_example);
        if (p.M == 5 || p.M == 6) return multiply_tiles<6, 2>(p, B, w_example);
        return multiply_tiles<4, 3>(p, B, w_example);
    }
}

// The products of B examples of x[M][K], dense, with weights of rows w_row elements apart and w_example from one to the
// next -> a kernel's status.
template <class Terms>
int64_t multiply_few(const typename Terms::X* x, const typename Terms::Weight* w, typename Terms::X* y, int64_t B,
                     int64_t M, int64_t N, int64_t K, int64_t w_example, int64_t w_row) {
    using X = typename Terms::X;
    constexpr int64_t kSize = sizeof(X);
    // Rows of x that are multiples of 4 KB apart share lines of the first-level cache.
    const bool clashes = M > 2 && K * kSize % 4096 == 0;
    const int64_t x_row = clashes ? K + kLine / kSize : K;
    X* spread = nullptr;
    if (clashes) {
        spread = static_cast<X*>(allocate_lines(B * M * x_row * kSize));
        if (spread == nullptr) return fp::kNoMemory;
        for (int64_t i = 0; i < B * M; ++i) memcpy(spread + i * x_row, x + i * K, static_cast<size_t>(K * kSize));
    }
    for (int64_t k = 0; k < K; k += Terms::kDepth) {
        const int64_t depth = least(K - k, Terms::kDepth);
        const X* rows = (clashes ? spread : x) + k;
        multiply_in_tiles(FewRows<Terms>{rows, w + k, y, M, N, depth, x_row, w_row, k > 0}, B, w_example);
    }
    free(spread);
    return 0;
}

}  // namespace

// SPDX-License-Identifier: Apache-2.0
// frozen_linear of a few rows in bf16, by instructions that multiply it: of the targets "avx512_bf16" and "amx".
//
// Reading the weight is what takes time, so it passes by once, and nothing is packed or turned: a sum has a lane for
// every kLanes-th pair of products, and lanes are added up at its end. The columns of y that are computed together lie
// far apart, so that each reads the weight in one line of its own, which a CPU reads ahead of. A row's result is the
// same bits whatever other rows there are. Formulas: fastprompt/ops/frozen_linear.py.
#include <stdlib.h>
#include <string.h>

#include "common/integers.h"
#include "common/kernel.h"
#include "cpu/lanes.h"
#include "cpu/memory.h"
#include "cpu/pairs.h"
#include "cpu/simd.h"

namespace {

constexpr int64_t kRows = 8;      // of x, multiplied together
constexpr int64_t kColumns = 24;  // of y: rows of the weight, which stay in the first-level cache for more rows of x
constexpr int64_t kStep = 2 * kLanes;  // products in a vector of pairs
constexpr int64_t kAhead = 2048;       // elements of the weight, asked for before they are multiplied

// y[M][N] = x[M][K] w[N][K]^T, rows of x and of w so many elements apart.
struct Product {
    const fp::bf16 *x, *w;
    fp::bf16* y;
    int64_t M, N, K, x_row, row;
};

FP_INLINE vuint pairs_at(const fp::bf16* from, Whole) { return PairMatrix::right(from); }

// Zeros past the last.
FP_INLINE vuint pairs_at(const fp::bf16* from, int64_t count) {
    fp::bf16 elements[kStep] = {};
    memcpy(elements, from, static_cast<size_t>(count) * sizeof(fp::bf16));
    return PairMatrix::right(elements);
}

// ROWS rows of y from m on, COLUMNS columns from n on, which lie `apart`.
template <int64_t ROWS, int64_t COLUMNS>
void some_sums(const Product& p, int64_t m, int64_t n, int64_t apart) {
    constexpr int64_t kSums = ROWS * COLUMNS, kFour = 4;
    const fp::bf16 *x = p.x + m * p.x_row, *w = p.w + n * p.row;
    vfloat sum[round_up(kSums, kFour)] = {};
    const auto add = [&](int64_t k, auto extent) {
        vuint right[COLUMNS];
#pragma GCC unroll 8
        for (int64_t j = 0; j < COLUMNS; ++j) {
            const fp::bf16* from = w + j * apart * p.row + k;
            // Of one or two rows a CPU reads ahead by itself as fast as they are multiplied. Into the second-level
            // cache, as the first one waits for few lines at a time.
            if (ROWS > 2) fetch_outer(from + kAhead);
            right[j] = pairs_at(from, extent);
        }
#pragma GCC unroll 8
        for (int64_t i = 0; i < ROWS; ++i) {
            const vuint left = pairs_at(x + i * p.x_row + k, extent);
#pragma GCC unroll 8
            for (int64_t j = 0; j < COLUMNS; ++j) {
                sum[i * COLUMNS + j] = PairMatrix::add(sum[i * COLUMNS + j], left, right[j]);
            }
        }
    };
    int64_t k = 0;
    for (; k + kStep <= p.K; k += kStep) add(k, Whole{});
    if (k < p.K) add(k, p.K - k);
    float total[round_up(kSums, kFour * kLanes)] = {};
#pragma GCC unroll 8
    for (int64_t s = 0; s < kSums; s += kFour) sum_lanes_of_four(sum + s, total + s);
    fp::bf16 rounded[round_up(kSums, kFour * kLanes)];
    for (int64_t s = 0; s < kSums; s += kLanes) store(rounded + s, load(total + s));
    for (int64_t i = 0; i < ROWS; ++i) {
        for (int64_t j = 0; j < COLUMNS; ++j) p.y[(m + i) * p.N + n + j * apart] = rounded[i * COLUMNS + j];
    }
}

// Rows [m, m + MOST) of y, or as many as there are.
template <int64_t MOST, int64_t COLUMNS>
void rows_from(const Product& p, int64_t m, int64_t n, int64_t apart) {
    if (p.M - m >= MOST) {
        some_sums<MOST, COLUMNS>(p, m, n, apart);
    } else if constexpr (MOST > 1) {
        rows_from<MOST - 1, COLUMNS>(p, m, n, apart);
    }
}

// COLUMNS of y at a time for MOST rows: as many sums as there are registers for. The products of B examples, whose
// weights lie w_example apart.
template <int64_t MOST, int64_t COLUMNS>
void multiply(const Product& first, int64_t B, int64_t w_example) {
    const int64_t M = first.M, N = first.N, apart = N / COLUMNS, some = kColumns / COLUMNS;
    const auto of_example = [=](int64_t b) {
        Product p = first;
        p.x += b * M * p.x_row;
        p.w += b * w_example;
        p.y += b * M * N;
        return p;
    };
#pragma omp parallel for collapse(2) schedule(static) if (B * N * first.K >= kParallelWeights)
    for (int64_t b = 0; b < B; ++b) {
        for (int64_t n = 0; n < apart; n += some) {
            const Product p = of_example(b);
            for (int64_t m = 0; m < M; m += MOST) {
                for (int64_t i = n; i < least(apart, n + some); ++i) rows_from<MOST, COLUMNS>(p, m, i, apart);
            }
        }
    }
    for (int64_t b = 0; b < B; ++b) {
        for (int64_t n = apart * COLUMNS; n < N; ++n) {
            for (int64_t m = 0; m < M; m += MOST) rows_from<MOST, 1>(of_example(b), m, n, 0);
        }
    }
}

// w[b * w_example + n * w_row + k] is element (n, k) of example b's weight.
int64_t frozen_linear(const fp::bf16* x, const fp::bf16* w, fp::bf16* y, int64_t B, int64_t M, int64_t N, int64_t K,
                      int64_t w_example, int64_t w_row, int64_t w_column, int64_t dtype, void* /*stream*/) {
    if (dtype != fp::kBFloat16 || w_column != 1) return fp::kBadOption;
    // Rows of x that are multiples of 4 KB apart share lines of the first-level cache.
    const bool clashes = M > 2 && K * static_cast<int64_t>(sizeof(fp::bf16)) % 4096 == 0;
    const int64_t x_row = clashes ? K + kStep : K;
    fp::bf16* spread = nullptr;
    if (clashes) {
        spread = static_cast<fp::bf16*>(allocate_lines(B * M * x_row * static_cast<int64_t>(sizeof(fp::bf16))));
        if (spread == nullptr) return fp::kNoMemory;
        for (int64_t i = 0; i < B * M; ++i) memcpy(spread + i * x_row, x + i * K, sizeof(fp::bf16) * K);
    }
    const Product first{clashes ? spread : x, w, y, M, N, K, x_row, w_row};
    if (M <= 2) {
        multiply<2, 8>(first, B, w_example);
    } else if (M <= 4) {
        multiply<4, 4>(first, B, w_example);
    } else {
        multiply<kRows, 3>(first, B, w_example);
    }
    free(spread);
    return 0;
}

FP_KERNEL(frozen_linear);

}  // namespace

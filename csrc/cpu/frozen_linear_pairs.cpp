// SPDX-License-Identifier: Apache-2.0
// frozen_linear of a few rows in bf16, by instructions that multiply it: of the targets "avx512_bf16" and "amx".
//
// Reading the weight is what takes time, so it passes by once, in order, and nothing is packed or turned: a sum has a
// lane for every kLanes-th pair of products, and lanes are added up at its end. A row's result is the same bits
// whatever other rows there are. Formulas: fastprompt/ops/frozen_linear.py.
#include "common/kernel.h"
#include "cpu/pairs.h"

namespace {

constexpr int64_t kRows = 8;      // of x, multiplied together
constexpr int64_t kColumns = 24;  // of y: rows of the weight, which stay in the first-level cache for more rows of x
constexpr int64_t kStep = 2 * kLanes;  // products in a vector of pairs

// y[M][N] = x[M][K] w[N][K]^T, rows of w `row` elements apart.
struct Product {
    const fp::bf16 *x, *w;
    fp::bf16* y;
    int64_t M, N, K, row;
};

FP_INLINE vuint pairs_at(const fp::bf16* from, Whole) { return PairMatrix::right(from); }

// Zeros past the last.
FP_INLINE vuint pairs_at(const fp::bf16* from, int64_t count) {
    fp::bf16 elements[kStep] = {};
    memcpy(elements, from, static_cast<size_t>(count) * sizeof(fp::bf16));
    return PairMatrix::right(elements);
}

// ROWS rows of y from m on, COLUMNS columns from n on.
template <int64_t ROWS, int64_t COLUMNS>
void some_sums(const Product& p, int64_t m, int64_t n) {
    constexpr int64_t kSums = ROWS * COLUMNS, kFour = 4;
    const fp::bf16 *x = p.x + m * p.K, *w = p.w + n * p.row;
    // What one row or two need is little, and then a CPU's own reading ahead is faster.
    const fp::bf16* next = ROWS > 2 && n + 2 * COLUMNS <= p.N ? w + COLUMNS * p.row : w;
    vfloat sum[round_up(kSums, kFour)] = {};
    const auto add = [&](int64_t k, auto extent) {
        vuint right[COLUMNS];
#pragma GCC unroll 8
        for (int64_t j = 0; j < COLUMNS; ++j) {
            if (ROWS > 2) fetch(next + j * p.row + k);
            right[j] = pairs_at(w + j * p.row + k, extent);
        }
#pragma GCC unroll 8
        for (int64_t i = 0; i < ROWS; ++i) {
            const vuint left = pairs_at(x + i * p.K + k, extent);
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
    for (int64_t i = 0; i < ROWS; ++i)
        memcpy(p.y + (m + i) * p.N + n, rounded + i * COLUMNS, sizeof(fp::bf16) * COLUMNS);
}

// Rows [m, m + ROWS) of y, columns [n, end). As many sums at a time as there are registers for.
template <int64_t ROWS>
void some_rows(const Product& p, int64_t m, int64_t n, int64_t end) {
    constexpr int64_t kTogether = ROWS <= 2 ? 8 : ROWS <= 4 ? 4 : 3;
    for (; n + kTogether <= end; n += kTogether) some_sums<ROWS, kTogether>(p, m, n);
    for (; n < end; ++n) some_sums<ROWS, 1>(p, m, n);
}

template <int64_t ROWS = kRows>
void rows_from(const Product& p, int64_t m, int64_t n, int64_t end) {
    if (p.M - m >= ROWS) {
        some_rows<ROWS>(p, m, n, end);
    } else if constexpr (ROWS > 1) {
        rows_from<ROWS - 1>(p, m, n, end);
    }
}

// w[b * w_example + n * w_row + k] is element (n, k) of example b's weight.
int64_t frozen_linear(const fp::bf16* x, const fp::bf16* w, fp::bf16* y, int64_t B, int64_t M, int64_t N, int64_t K,
                      int64_t w_example, int64_t w_row, int64_t w_column, int64_t dtype, void* /*stream*/) {
    if (dtype != fp::kBFloat16 || w_column != 1) return fp::kBadOption;
#pragma omp parallel for collapse(2) schedule(static) if (B * N * K >= kParallelWeights)
    for (int64_t b = 0; b < B; ++b) {
        for (int64_t n = 0; n < N; n += kColumns) {
            const Product p{x + b * M * K, w + b * w_example, y + b * M * N, M, N, K, w_row};
            for (int64_t m = 0; m < M; m += kRows) rows_from(p, m, n, least(N, n + kColumns));
        }
    }
    return 0;
}

FP_KERNEL(frozen_linear);

}  // namespace

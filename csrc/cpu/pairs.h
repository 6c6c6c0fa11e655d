// SPDX-License-Identifier: Apache-2.0
// Products of bf16 matrices by AVX512_BF16, whose instruction adds two products to each of 16 fp32 sums.
//
// A factor on the right has its rows in pairs: elements (2r, j) and (2r + 1, j) are neighbours, and j + 1 follows.
#pragma once
#include "cpu/simd.h"

namespace {

constexpr int64_t kFactorRows = 1;       // the left factor's rows come in multiples of it,
constexpr int64_t kFactorColumns = 16;   // the right one's columns
constexpr int64_t kFactorDepth = 2;      // and products of a sum
constexpr bool kTransposesSums = false;  // as either factor may have its rows in pairs

struct Unit {};  // nothing has to be made ready

// A factor on the left: products 2r and 2r + 1 of row i begin at data[i * row + r * pair].
struct PairMatrix {
    const fp::bf16* data;
    int64_t row, pair;
};

constexpr int kPairRows = 6;     // of a block of sums, which the registers hold beside its factors
constexpr int kPairVectors = 4;  // side by side

// sum + left.high * right.high + left.low * right.low, rounded twice. Subnormal numbers are zero.
FP_INLINE vfloat add_pair(vfloat sum, vuint left, vuint right) {
#if FP_LANES == 16 && defined(__AVX512BF16__)
    return bit_cast<vfloat>(
        _mm512_dpbf16_ps(bit_cast<__m512>(sum), bit_cast<__m512bh>(left), bit_cast<__m512bh>(right)));
#else
    const auto half = [](vuint bits) { return bit_cast<vfloat>((bits & 0x7f800000u) == 0u ? vuint{} : bits); };
    sum = fused_multiply_add(half(left & 0xffff0000u), half(right & 0xffff0000u), sum);
    return fused_multiply_add(half(left << 16), half(right << 16), sum);
#endif
}

// c[ROWS][VECTORS * kLanes] = or += a[ROWS][depth] * b[depth][VECTORS * kLanes]
template <int ROWS, int VECTORS>
FP_INLINE void multiply_pairs(PairMatrix a, const fp::bf16* b, int64_t b_row, float* c, int64_t c_row, int64_t depth,
                              bool adds) {
    vfloat sum[ROWS][VECTORS] = {};
    for (int64_t r = 0; r < depth / 2; ++r) {
        vuint right[VECTORS];
#pragma GCC unroll 8
        for (int64_t v = 0; v < VECTORS; ++v) memcpy(&right[v], b + r * b_row + 2 * v * kLanes, sizeof(vuint));
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; ++i) {
            uint32_t pair;
            memcpy(&pair, a.data + i * a.row + r * a.pair, sizeof(pair));
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; ++v) sum[i][v] = add_pair(sum[i][v], vuint{} + pair, right[v]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) {
            float* to = c + i * c_row + v * kLanes;
            store(to, adds ? load(to) + sum[i][v] : sum[i][v]);
        }
    }
}

template <int VECTORS>
void multiply_pair_panel(PairMatrix a, int64_t rows, const fp::bf16* b, int64_t b_row, float* c, int64_t c_row,
                         int64_t depth, bool adds) {
    int64_t i = 0;
    const auto at = [&](int64_t row) { return PairMatrix{a.data + row * a.row, a.row, a.pair}; };
    for (; i + kPairRows <= rows; i += kPairRows) {
        multiply_pairs<kPairRows, VECTORS>(at(i), b, b_row, c + i * c_row, c_row, depth, adds);
    }
    for (; i + 2 <= rows; i += 2) multiply_pairs<2, VECTORS>(at(i), b, b_row, c + i * c_row, c_row, depth, adds);
    for (; i < rows; ++i) multiply_pairs<1, VECTORS>(at(i), b, b_row, c + i * c_row, c_row, depth, adds);
}

// c[rows][columns] = or += a[rows][depth] * b[depth][columns]; columns in whole vectors, depth in pairs. b_row is from
// one row of pairs to the next, in elements.
inline void multiply(PairMatrix a, int64_t rows, const fp::bf16* b, int64_t b_row, int64_t columns, float* c,
                     int64_t c_row, int64_t depth, bool adds) {
    int64_t j = 0;
    for (; j + kPairVectors * kLanes <= columns; j += kPairVectors * kLanes) {
        multiply_pair_panel<kPairVectors>(a, rows, b + 2 * j, b_row, c + j, c_row, depth, adds);
    }
    for (; j + 2 * kLanes <= columns; j += 2 * kLanes) {
        multiply_pair_panel<2>(a, rows, b + 2 * j, b_row, c + j, c_row, depth, adds);
    }
    if (j < columns) multiply_pair_panel<1>(a, rows, b + 2 * j, b_row, c + j, c_row, depth, adds);
}

// The same, a[rows][depth] row by row.
inline void multiply(const fp::bf16* a, int64_t a_row, int64_t rows, const fp::bf16* b, int64_t b_row, int64_t columns,
                     float* c, int64_t c_row, int64_t depth, bool adds) {
    multiply({a, a_row, 2}, rows, b, b_row, columns, c, c_row, depth, adds);
}

}  // namespace

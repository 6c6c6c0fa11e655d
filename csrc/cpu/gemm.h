// SPDX-License-Identifier: Apache-2.0
// Small products of matrices that lie in the caches: what attention and frozen_linear are made of. Here of fp32; of
// bf16 in pairs.h, whose left factor is another class with the members of Matrix.
#pragma once
#include "cpu/simd.h"

namespace {

// A left factor whose element (i, k) is data[i * row + k * column]: a transposed one has row 1.
struct Matrix {
    using Right = float;                  // elements of the right factor
    static constexpr int64_t kWidth = 1;  // so many of each column are neighbours

    const float* data;
    int64_t row, column;

    FP_INLINE Matrix from(int64_t i) const { return {data + i * row, row, column}; }
    FP_INLINE vfloat at(int64_t i, int64_t k) const { return splat(data[i * row + k * column]); }
    FP_INLINE static vfloat right(const float* b) { return load(b); }
    FP_INLINE static vfloat add(vfloat sum, vfloat left, vfloat right) { return fused_multiply_add(left, right, sum); }
};

// Accumulators of a tile: as many as the registers hold beside the operands (AVX-512 and NEON have 32, AVX2 16).
constexpr int kTileRows = 6;
constexpr int kTileVectors = FP_LANES == 16 || FP_LANES == 4 ? 4 : 2;
constexpr int64_t kTileColumns = kTileVectors * kLanes;

// So many products are added up in registers: short chains keep the error small. Fewer where each is rounded.
constexpr int64_t kTileChain = FP_LANES > 1 ? 128 : 8;

// Steps per turn of a tile's loop. With eight lanes a step is short.
constexpr int kUnrolledSteps = FP_LANES == 8 ? 4 : 1;

// c[ROWS][VECTORS * kLanes] = or += a[ROWS][steps] * b[steps][VECTORS * kLanes]
template <int ROWS, int VECTORS, class Left>
FP_INLINE void multiply_tile(Left a, const typename Left::Right* b, int64_t b_row, float* c, int64_t c_row,
                             int64_t steps, bool adds) {
    vfloat sum[ROWS][VECTORS] = {};
#pragma GCC unroll kUnrolledSteps
    for (int64_t k = 0; k < steps; ++k) {
        decltype(Left::right(b)) right[VECTORS];
#pragma GCC unroll 8
        for (int64_t v = 0; v < VECTORS; ++v) right[v] = Left::right(b + k * b_row + v * Left::kWidth * kLanes);
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; ++i) {
            const auto left = a.at(i, k);
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; ++v) sum[i][v] = Left::add(sum[i][v], left, right[v]);
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

template <int VECTORS, class Left>
void multiply_panel(Left a, int64_t rows, const typename Left::Right* b, int64_t b_row, float* c, int64_t c_row,
                    int64_t steps, bool adds) {
    int64_t i = 0;
    for (; i + kTileRows <= rows; i += kTileRows) {
        multiply_tile<kTileRows, VECTORS>(a.from(i), b, b_row, c + i * c_row, c_row, steps, adds);
    }
    for (; i + 2 <= rows; i += 2) multiply_tile<2, VECTORS>(a.from(i), b, b_row, c + i * c_row, c_row, steps, adds);
    for (; i < rows; ++i) multiply_tile<1, VECTORS>(a.from(i), b, b_row, c + i * c_row, c_row, steps, adds);
}

// c[rows][columns] = or += a[rows][steps] * b[steps][columns], in one chain; columns is a multiple of kLanes.
template <class Left>
FP_INLINE void multiply_chain(Left a, int64_t rows, const typename Left::Right* b, int64_t b_row, int64_t columns,
                              float* c, int64_t c_row, int64_t steps, bool adds) {
    const auto at = [b](int64_t j) { return b + j * Left::kWidth; };
    int64_t j = 0;
    for (; j + kTileColumns <= columns; j += kTileColumns) {
        multiply_panel<kTileVectors>(a, rows, at(j), b_row, c + j, c_row, steps, adds);
    }
    if (columns - j >= 2 * kLanes) {
        multiply_panel<2>(a, rows, at(j), b_row, c + j, c_row, steps, adds);
        j += 2 * kLanes;
    }
    if (j < columns) multiply_panel<1>(a, rows, at(j), b_row, c + j, c_row, steps, adds);
}

// c[rows][columns] = or += a[rows][depth] * b[depth][columns]; columns is a multiple of kLanes.
inline void multiply(Matrix a, int64_t rows, const float* b, int64_t b_row, int64_t columns, float* c, int64_t c_row,
                     int64_t depth, bool adds = true) {
    for (int64_t k = 0; k < depth; k += kTileChain, adds = true) {
        const int64_t part = depth - k < kTileChain ? depth - k : kTileChain;
        const Matrix left{a.data + k * a.column, a.row, a.column};
        multiply_chain(left, rows, b + k * b_row, b_row, columns, c, c_row, part, adds);
    }
}

}  // namespace

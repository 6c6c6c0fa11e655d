// SPDX-License-Identifier: Apache-2.0
// Small products of fp32 matrices that lie in the caches: what attention and frozen_linear are made of.
#pragma once
#include "cpu/simd.h"

namespace {

// A matrix whose element (i, k) is data[i * row + k * column]: a transposed one has row 1.
struct Matrix {
    const float* data;
    int64_t row, column;
};

// Accumulators of a tile: as many as the registers hold beside the operands (AVX-512 and NEON have 32, AVX2 16).
constexpr int kTileRows = 6;
constexpr int kTileVectors = FP_LANES == 16 || FP_LANES == 4 ? 4 : 2;
constexpr int64_t kTileColumns = kTileVectors * kLanes;

// So many products are added up in registers: short chains keep the error small. Fewer where each is rounded.
constexpr int64_t kDepth = FP_LANES > 1 ? 128 : 8;

// c[ROWS][VECTORS * kLanes] = or += a[ROWS][depth] * b[depth][VECTORS * kLanes]
template <int ROWS, int VECTORS>
FP_INLINE void multiply_tile(Matrix a, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t depth,
                             bool adds = true) {
    vfloat sum[ROWS][VECTORS] = {};
    for (int64_t k = 0; k < depth; ++k) {
        vfloat right[VECTORS];
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) right[v] = load(b + k * b_row + v * kLanes);
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; ++i) {
            const vfloat left = splat(a.data[i * a.row + k * a.column]);
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; ++v) sum[i][v] = fused_multiply_add(left, right[v], sum[i][v]);
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
void multiply_panel(Matrix a, int64_t rows, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t depth,
                    bool adds) {
    int64_t i = 0;
    const auto at = [&](int64_t row) { return Matrix{a.data + row * a.row, a.row, a.column}; };
    for (; i + kTileRows <= rows; i += kTileRows) {
        multiply_tile<kTileRows, VECTORS>(at(i), b, b_row, c + i * c_row, c_row, depth, adds);
    }
    for (; i + 2 <= rows; i += 2) multiply_tile<2, VECTORS>(at(i), b, b_row, c + i * c_row, c_row, depth, adds);
    for (; i < rows; ++i) multiply_tile<1, VECTORS>(at(i), b, b_row, c + i * c_row, c_row, depth, adds);
}

// c[rows][columns] = or += a[rows][depth] * b[depth][columns]; columns is a multiple of kLanes.
inline void multiply(Matrix a, int64_t rows, const float* b, int64_t b_row, int64_t columns, float* c, int64_t c_row,
                     int64_t depth, bool adds = true) {
    for (int64_t k = 0; k < depth; k += kDepth, adds = true) {
        const int64_t part = depth - k < kDepth ? depth - k : kDepth;
        const Matrix left{a.data + k * a.column, a.row, a.column};
        const float* right = b + k * b_row;
        int64_t j = 0;
        for (; j + kTileColumns <= columns; j += kTileColumns) {
            multiply_panel<kTileVectors>(left, rows, right + j, b_row, c + j, c_row, part, adds);
        }
        if (columns - j >= 2 * kLanes) {
            multiply_panel<2>(left, rows, right + j, b_row, c + j, c_row, part, adds);
            j += 2 * kLanes;
        }
        if (j < columns) multiply_panel<1>(left, rows, right + j, b_row, c + j, c_row, part, adds);
    }
}

}  // namespace

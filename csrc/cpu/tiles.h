// SPDX-License-Identifier: Apache-2.0
// Products of bf16 matrices by AMX: tiles of 16 x 16 fp32 sums, 16,384 operations per instruction.
//
// A factor on the right has its rows in pairs: elements (2r, j) and (2r + 1, j) are neighbours, and j + 1 follows.
#pragma once
#include "cpu/simd.h"

#if defined(FP_EMULATED_AMX)
#include "amx.h"  // of the tests
#endif

namespace {

constexpr int64_t kTile = 16;                // rows and columns of a tile's sums
constexpr int64_t kFactorRows = kTile;       // the left factor's rows come in multiples of it,
constexpr int64_t kFactorColumns = kTile;    // the right one's columns
constexpr int64_t kFactorDepth = 2 * kTile;  // and products of a sum: an instruction adds so many to each
constexpr bool kTransposesSums = true;       // as only the right factor may have its rows in pairs

// While it lives, this thread's eight tiles have 16 rows of 64 bytes.
class Unit {
public:
    Unit() {
        struct alignas(64) {
            uint8_t palette, start_row, reserved[14];
            uint16_t row_bytes[16];
            uint8_t rows[16];
        } shapes = {};
        shapes.palette = 1;
        for (int64_t tile = 0; tile < 8; ++tile) shapes.row_bytes[tile] = 64, shapes.rows[tile] = kTile;
        _tile_loadconfig(&shapes);
    }
    ~Unit() { _tile_release(); }
    Unit(const Unit&) = delete;
    Unit& operator=(const Unit&) = delete;
};

// c[ROWS * 16][COLUMNS * 16] = or += a[ROWS * 16][depth] * b[depth][COLUMNS * 16]
template <int ROWS, int COLUMNS>
FP_INLINE void multiply_tiles(const fp::bf16* a, int64_t a_row, const fp::bf16* b, int64_t b_row, float* c,
                              int64_t c_row, int64_t depth, bool adds) {
    constexpr int64_t kFloat = sizeof(float), kHalf = sizeof(fp::bf16);
    float* below = c + kTile * c_row;
    if (adds) {
        _tile_loadd(0, c, c_row * kFloat);
        if constexpr (COLUMNS == 2) _tile_loadd(1, c + kTile, c_row * kFloat);
        if constexpr (ROWS == 2) _tile_loadd(2, below, c_row * kFloat);
        if constexpr (ROWS == 2 && COLUMNS == 2) _tile_loadd(3, below + kTile, c_row * kFloat);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t k = 0; k < depth; k += kFactorDepth) {
        const fp::bf16* right = b + k / 2 * b_row;
        _tile_loadd(4, a + k, a_row * kHalf);
        _tile_loadd(6, right, b_row * kHalf);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (COLUMNS == 2) {
            _tile_loadd(7, right + 2 * kTile, b_row * kHalf);
            _tile_dpbf16ps(1, 4, 7);
        }
        if constexpr (ROWS == 2) {
            _tile_loadd(5, a + kTile * a_row + k, a_row * kHalf);
            _tile_dpbf16ps(2, 5, 6);
        }
        if constexpr (ROWS == 2 && COLUMNS == 2) _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, c_row * kFloat);
    if constexpr (COLUMNS == 2) _tile_stored(1, c + kTile, c_row * kFloat);
    if constexpr (ROWS == 2) _tile_stored(2, below, c_row * kFloat);
    if constexpr (ROWS == 2 && COLUMNS == 2) _tile_stored(3, below + kTile, c_row * kFloat);
}

// c[rows][columns] = or += a[rows][depth] * b[depth][columns]; rows and columns in whole tiles, depth of 32. b_row is
// from one row of pairs to the next, in elements.
inline void multiply(const fp::bf16* a, int64_t a_row, int64_t rows, const fp::bf16* b, int64_t b_row, int64_t columns,
                     float* c, int64_t c_row, int64_t depth, bool adds) {
    __asm__ volatile("" ::: "memory");  // gcc does not know that loading a tile reads what was stored before
    for (int64_t j = 0; j < columns; j += 2 * kTile) {
        const fp::bf16* right = b + 2 * j;
        for (int64_t i = 0; i < rows; i += 2 * kTile) {
            const fp::bf16* left = a + i * a_row;
            float* to = c + i * c_row + j;
            const bool two_rows = i + kTile < rows, two_columns = j + kTile < columns;
            if (two_rows && two_columns) {
                multiply_tiles<2, 2>(left, a_row, right, b_row, to, c_row, depth, adds);
            } else if (two_rows) {
                multiply_tiles<2, 1>(left, a_row, right, b_row, to, c_row, depth, adds);
            } else if (two_columns) {
                multiply_tiles<1, 2>(left, a_row, right, b_row, to, c_row, depth, adds);
            } else {
                multiply_tiles<1, 1>(left, a_row, right, b_row, to, c_row, depth, adds);
            }
        }
    }
}

}  // namespace

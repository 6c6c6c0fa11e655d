// SPDX-License-Identifier: Apache-2.0
// Products of bf16 matrices by AVX512_BF16, whose instruction adds two products to each of 16 fp32 sums.
//
// A factor on the right has its rows in pairs: elements (2r, j) and (2r + 1, j) are neighbours, and j + 1 follows.
#pragma once
#include <stdint.h>
#include <string.h>

#include "cpu/gemm.h"
#include "cpu/simd.h"

namespace {

constexpr int64_t kFactorRows = 1;       // the left factor's rows come in multiples of it,
constexpr int64_t kFactorColumns = 16;   // the right one's columns
constexpr int64_t kFactorDepth = 2;      // and products of a sum
constexpr bool kTransposesSums = false;  // as either factor may have its rows in pairs

struct Unit {};  // nothing has to be made ready

// A factor on the left: products 2r and 2r + 1 of row i begin at data[i * row + r * pair].
struct PairMatrix {
    using Right = fp::bf16;
    static constexpr int64_t kWidth = 2;

    const fp::bf16* data;
    int64_t row, pair;

    FP_INLINE PairMatrix from(int64_t i) const { return {data + i * row, row, pair}; }
    FP_INLINE vuint at(int64_t i, int64_t r) const {
        uint32_t two;
        memcpy(&two, data + i * row + r * pair, sizeof(two));
        return vuint{} + two;
    }
    FP_INLINE static vuint right(const fp::bf16* b) {
        vuint pairs;
        memcpy(&pairs, b, sizeof(pairs));
        return pairs;
    }

    // sum + left.high * right.high + left.low * right.low, rounded twice. Subnormal numbers are zero.
    FP_INLINE static vfloat add(vfloat sum, vuint left, vuint right) {
#if FP_LANES == 16 && defined(__AVX512BF16__)
        return bit_cast<vfloat>(
            _mm512_dpbf16_ps(bit_cast<__m512>(sum), bit_cast<__m512bh>(left), bit_cast<__m512bh>(right)));
#else
        const auto half = [](vuint bits) { return bit_cast<vfloat>((bits & 0x7f800000u) == 0u ? vuint{} : bits); };
        sum = fused_multiply_add(half(left & 0xffff0000u), half(right & 0xffff0000u), sum);
        return fused_multiply_add(half(left << 16), half(right << 16), sum);
#endif
    }
};

// c[rows][columns] = or += a[rows][depth] * b[depth][columns]; columns in whole vectors, depth in pairs. b_row is from
// one row of pairs to the next, in elements.
inline void multiply(PairMatrix a, int64_t rows, const fp::bf16* b, int64_t b_row, int64_t columns, float* c,
                     int64_t c_row, int64_t depth, bool adds) {
    multiply_chain(a, rows, b, b_row, columns, c, c_row, depth / 2, adds);
}

// The same, a[rows][depth] row by row.
inline void multiply(const fp::bf16* a, int64_t a_row, int64_t rows, const fp::bf16* b, int64_t b_row, int64_t columns,
                     float* c, int64_t c_row, int64_t depth, bool adds) {
    multiply(PairMatrix{a, a_row, 2}, rows, b, b_row, columns, c, c_row, depth, adds);
}

}  // namespace

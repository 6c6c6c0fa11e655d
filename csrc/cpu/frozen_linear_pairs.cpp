// SPDX-License-Identifier: Apache-2.0
// frozen_linear of a few rows in bf16, by instructions that multiply it: of the targets "avx512_bf16" and "amx".
// Formulas: fastprompt/ops/frozen_linear.py.
#include <string.h>

#include "common/kernel.h"
#include "cpu/few_rows.h"
#include "cpu/pairs.h"

namespace {

// Both factors' rows in pairs.
struct Pairs {
    using X = fp::bf16;
    using Weight = fp::bf16;
    static constexpr int64_t kStep = 2 * kLanes, kBytesAhead = 4096;
    static constexpr int64_t kDepth = INT64_MAX;  // y cannot hold part of a sum

    FP_INLINE static vuint at(const fp::bf16* from, Whole /*extent*/) { return PairMatrix::right(from); }
    FP_INLINE static vuint at(const fp::bf16* from, Part part) {
        fp::bf16 elements[kStep] = {};
        memcpy(elements, from, static_cast<size_t>(part.count) * sizeof(fp::bf16));
        return PairMatrix::right(elements);
    }
    FP_INLINE static vfloat add(vfloat sum, vuint left, vuint right) { return PairMatrix::add(sum, left, right); }
    FP_INLINE static fp::bf16 joined(fp::bf16 /*y*/, fp::bf16 sum, bool /*adds*/) { return sum; }
};

// w[b * w_example + n * w_row + k] is element (n, k) of example b's weight.
int64_t frozen_linear(const fp::bf16* x, const fp::bf16* w, fp::bf16* y, int64_t B, int64_t M, int64_t N, int64_t K,
                      int64_t w_example, int64_t w_row, int64_t w_column, int64_t dtype, void* /*stream*/) {
    if (dtype != fp::kBFloat16 || w_column != 1) return fp::kBadOption;
    return multiply_few<Pairs>(x, w, y, B, M, N, K, w_example, w_row);
}

FP_KERNEL(frozen_linear);

}  // namespace

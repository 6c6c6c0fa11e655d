// SPDX-License-Identifier: Apache-2.0
// The gradient of the prompts' keys or values from each example's share of it.
#include "common/kernel.h"
#include "cpu/memory.h"
#include "cpu/simd.h"

namespace {

// total[r] = the sum over b, ascending, of share[b] where example b reads prompt r.
int64_t t5_attention_prompt_sum(const float* share, const int64_t* prompt_ids, void* total, int64_t B, int64_t R,
                                int64_t row_elements, int64_t dtype, void* /*stream*/) {
    if (!is_dtype(dtype)) return fp::kBadOption;
    for (int64_t b = 0; prompt_ids != nullptr && b < B; ++b) {
        if (prompt_ids[b] < 0 || prompt_ids[b] >= R) return fp::kBadRange;
    }
    constexpr int64_t kColumns = 256;
    const int64_t parts = (row_elements + kColumns - 1) / kColumns;
#pragma omp parallel for schedule(static) if (B * row_elements >= kParallelElements)
    for (int64_t task = 0; task < R * parts; ++task) {
        const int64_t r = task / parts, first = task % parts * kColumns;
        const int64_t count = row_elements - first < kColumns ? row_elements - first : kColumns;
        float sum[kColumns] = {};
        for (int64_t b = 0; b < B; ++b) {
            if ((prompt_ids == nullptr ? 0 : prompt_ids[b]) != r) continue;
            const float* row = share + b * row_elements + first;
            each_vector(count,
                        [&](int64_t d, auto extent) { store(sum + d, load(sum + d) + load_at(row, d, extent)); });
        }
        with_type(dtype, [&](auto type) {
            auto* to = static_cast<decltype(type)*>(total) + r * row_elements + first;
            each_vector(count, [&](int64_t d, auto extent) { store_at(to, d, extent, load(sum + d)); });
        });
    }
    return 0;
}

FP_KERNEL(t5_attention_prompt_sum);

}  // namespace

// SPDX-License-Identifier: Apache-2.0
// dropout_add on the CPU: one pass, no mask in memory. Formulas: fastprompt/ops/dropout_add.py.
#include "common/kernel.h"
#include "cpu/dropout.h"
#include "cpu/memory.h"
#include "cpu/simd.h"

namespace {

// residual may be null.
int64_t dropout_add(const void* x, const void* residual, const int64_t* seed, void* h, int64_t count, double dropout_p,
                    int64_t dtype, void* /*stream*/) {
    if (!is_dtype(dtype)) return fp::kBadOption;
    const Dropout dropout(seed, dropout_p);
    const Put how = put_in_passing(dropout.active());
    with_type(dtype, [&](auto type) {
        using T = decltype(type);
        const T *xs = static_cast<const T*>(x), *residuals = static_cast<const T*>(residual);
        T* hs = static_cast<T*>(h);
        each_chunk_parallel(count, [&](int64_t first, int64_t size) {
            with_factors(dropout, first, size, [&](const auto& factor_at) {
                each_vector(size, [&](int64_t i, auto extent) {
                    vfloat value = drop(load_at(xs + first, i, extent), factor_at(i, extent));
                    if (residuals != nullptr) value += load_at(residuals + first, i, extent);
                    store_at(hs + first, i, extent, value, how);
                });
            });
        });
    });
    return 0;
}

FP_KERNEL(dropout_add);

}  // namespace

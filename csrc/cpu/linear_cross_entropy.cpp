// SPDX-License-Identifier: Apache-2.0
// A chunk of logits on the CPU: its row, read from memory once, lies in the second-level cache when it is read again.
// Formulas, shapes and dtypes: fastprompt/ops/linear_cross_entropy.py.
#include "common/kernel.h"
#include "cpu/simd.h"

namespace {

constexpr int64_t kBadDType = -1;

template <class T>
FP_INLINE vfloat logits_at(const T* row, int64_t offset, Whole whole) {
    return load_at(row, offset, whole);
}

// The lanes past the row are -infinity: e to that power adds nothing.
template <class T>
FP_INLINE vfloat logits_at(const T* row, int64_t offset, Part part) {
    T elements[kLanes];
    for (T& element : elements) element = from_float<T>(-INFINITY);
    memcpy(elements, row + offset, static_cast<size_t>(part.count) * sizeof(T));
    return load(elements);
}

// NaN is passed over: the sum has it.
template <class T>
float largest(const T* row, int64_t C) {
    vfloat top = splat(-INFINITY);
    each_vector(C, [&](int64_t c, auto extent) {
        const vfloat value = logits_at(row, c, extent);
        top = value > top ? value : top;
    });
    return largest_lane(top);
}

// `label` counts from the chunk's first class; others is null where no gradient is wanted.
template <class T>
void take_row(T* row, int64_t label, float* top, float* total, float* picked, float* others, int64_t C, int64_t D) {
    if (label >= 0 && label < C) {
        *picked = to_float(row[label]);
        row[label] = from_float<T>(-INFINITY);
    }
    const float in_row = largest(row, C);
    const float now = in_row > *top ? in_row : *top;
    const float base = now == -INFINITY ? 0.0f : now;  // nothing seen yet: -infinity less itself would be NaN
    const float factor = expf(*top - base);
    RowSum sum;
    sum.add(C, [&](int64_t c, auto extent) {
        const vfloat weight = exp(logits_at(row, c, extent) - base);
        if (others != nullptr) store_at(row, c, extent, weight);
        return weight;
    });
    *total = *total * factor + sum.total();
    *top = now;
    if (others != nullptr && factor != 1.0f) {
        each_vector(D,
                    [&](int64_t d, auto extent) { store_at(others, d, extent, load_at(others, d, extent) * factor); });
    }
}

int64_t linear_cross_entropy(void* logits, const int64_t* labels, float* top, float* total, float* picked,
                             float* others, int64_t N, int64_t C, int64_t first, int64_t D, int64_t dtype,
                             void* /*stream*/) {
    if (!is_dtype(dtype)) return kBadDType;
    with_type(dtype, [&](auto type) {
        using T = decltype(type);
#pragma omp parallel for schedule(static) if (N * C >= kParallelElements)
        for (int64_t n = 0; n < N; ++n) {
            take_row(static_cast<T*>(logits) + n * C, labels[n] - first, top + n, total + n, picked + n,
                     others == nullptr ? nullptr : others + n * D, C, D);
        }
    });
    return 0;
}

FP_KERNEL(linear_cross_entropy);

}  // namespace

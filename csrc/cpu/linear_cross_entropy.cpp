// SPDX-License-Identifier: Apache-2.0
// A chunk of logits on the CPU: its row, read from memory once, lies in the second-level cache when it is read again.
// Then the rows' losses and gradients, and their mean.
// Formulas, shapes and dtypes: fastprompt/ops/linear_cross_entropy.py.
#include "common/linear_cross_entropy.h"

#include <math.h>
#include <string.h>

#include "common/dtype.h"
#include "common/kernel.h"
#include "cpu/exp.h"
#include "cpu/lanes.h"
#include "cpu/memory.h"
#include "cpu/simd.h"

namespace {

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

// `label` counts from the chunk's first class. Before the `initial` chunk the statistics hold nothing; others is null
// where earlier chunks gave nothing.
template <class T>
void take_row(T* row, int64_t label, bool initial, float* top, float* total, float* picked, float* others, int64_t C,
              int64_t D, bool needs_grad) {
    if (initial) {
        *top = -INFINITY;
        *total = 0.0f;
        *picked = NAN;
    }
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
        if (needs_grad) store_at(row, c, extent, weight);
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
                             float* others, int64_t N, int64_t C, int64_t first, int64_t D, int64_t needs_grad,
                             int64_t dtype, void* /*stream*/) {
    if (!is_dtype(dtype)) return fp::kBadOption;
    with_type(dtype, [&](auto type) {
        using T = decltype(type);
#pragma omp parallel for schedule(static) if (N * C >= kParallelElements)
        for (int64_t n = 0; n < N; ++n) {
            take_row(static_cast<T*>(logits) + n * C, labels[n] - first, first == 0, top + n, total + n, picked + n,
                     others == nullptr ? nullptr : others + n * D, C, D, needs_grad != 0);
        }
    });
    return 0;
}

// others and drow are null where no gradient is wanted.
template <class T>
void finish_row(bool counts, const fp::RowLoss& found, const float* others, const T* of_label, float* loss, T* drow,
                int64_t D) {
    *loss = counts ? found.loss : 0.0f;
    if (drow == nullptr) return;
    each_vector(D, [&](int64_t d, auto extent) {
        const vfloat gradient = (load_at(others, d, extent) / found.share - load_at(of_label, d, extent)) * found.odds;
        store_at(drow, d, extent, counts ? gradient : vfloat{});
    });
}

// Row n's label has its row of weight at label_stride * label + row_stride * n; others and drows may be null.
int64_t linear_cross_entropy_rows(const int64_t* labels, const float* top, const float* total, const float* picked,
                                  const float* others, const void* weight, float* losses, void* drows, int64_t N,
                                  int64_t D, int64_t V, int64_t label_stride, int64_t row_stride, int64_t ignore_index,
                                  int64_t dtype, void* /*stream*/) {
    if (!is_dtype(dtype)) return fp::kBadOption;
    with_type(dtype, [&](auto type) {
        using T = decltype(type);
#pragma omp parallel for schedule(static) if (N * D >= kParallelElements)
        for (int64_t n = 0; n < N; ++n) {
            const int64_t known = known_class(labels[n], V);
            finish_row(labels[n] != ignore_index, row_loss(top[n], total[n], picked[n]),
                       others == nullptr ? nullptr : others + n * D,
                       static_cast<const T*>(weight) + known * label_stride + n * row_stride, losses + n,
                       drows == nullptr ? nullptr : static_cast<T*>(drows) + n * D, D);
        }
    });
    return 0;
}

// `divisor` is null for the number of labels that count.
int64_t linear_cross_entropy_mean(const float* losses, const int64_t* labels, const float* divisor, void* loss,
                                  float* share, int64_t N, int64_t ignore_index, double scale, int64_t dtype,
                                  void* /*stream*/) {
    if (!is_dtype(dtype)) return fp::kBadOption;
    RowSum sum;
    sum.add(N, [&](int64_t n, auto extent) { return load_at(losses, n, extent); });
    int64_t count = 0;
    for (int64_t n = 0; n < N; ++n) count += labels[n] != ignore_index;
    const float by = divisor == nullptr ? static_cast<float>(count) : *divisor;
    with_type(dtype, [&](auto type) {
        *static_cast<decltype(type)*>(loss) = from_float<decltype(type)>(count > 0 ? sum.total() / by : 0.0f);
    });
    *share = count > 0 ? static_cast<float>(scale) / by : 0.0f;
    return 0;
}

FP_KERNEL(linear_cross_entropy);
FP_KERNEL(linear_cross_entropy_rows);
FP_KERNEL(linear_cross_entropy_mean);

}  // namespace

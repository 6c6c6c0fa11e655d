// SPDX-License-Identifier: Apache-2.0
// rms_norm on the CPU: a row at a time, one read from memory; the second pass over the row finds it in L1.
// Formulas, shapes and dtypes: fastprompt/ops/rms_norm.py.
#include <stdlib.h>

#include "common/kernel.h"
#include "cpu/simd.h"

namespace {

constexpr int64_t kBadDType = -1, kNoMemory = -2;

float rstd_of(float sum_of_squares, int64_t D, double eps) {
    return 1.0f / sqrtf(sum_of_squares / static_cast<float>(D) + static_cast<float>(eps));
}

template <class X>
float sum_of_squares(const X* x, int64_t D) {
    return RowSum().over(D, [&](int64_t d) {
        const vfloat value = load_at(x, d, D);
        return value * value;
    });
}

template <class X, class W>
void scale_row(const X* x, const W* w, float rstd, W* y, int64_t D) {
    for (int64_t d = 0; d < D; d += kLanes) {
        store_at(y, d, D, load_at(w, d, D) * (load_at(x, d, D) * rstd));
    }
}

// dh = rstd * (g - h * rstd^2 * mean(g * h)), g = dy * w; visit(d, dh) takes each vector of it.
template <class X, class W, class Visit>
void backward_row(const W* dy, const X* x, const W* w, float rstd, int64_t D, const Visit& visit) {
    const float dot =
        RowSum().over(D, [&](int64_t d) { return load_at(dy, d, D) * load_at(w, d, D) * load_at(x, d, D); });
    const float slope = rstd * rstd * (dot / static_cast<float>(D));
    for (int64_t d = 0; d < D; d += kLanes) {
        visit(d, rstd * (load_at(dy, d, D) * load_at(w, d, D) - load_at(x, d, D) * slope));
    }
}

int64_t rms_norm(const void* x, const void* w, void* y, float* rstd, int64_t N, int64_t D, double eps, int64_t x_dtype,
                 int64_t w_dtype, void* /*stream*/) {
    bool known = false;
    with_type(x_dtype, [&](auto x_type) {
        known = with_type(w_dtype, [&](auto w_type) {
            using X = decltype(x_type);
            using W = decltype(w_type);
            const X* xs = static_cast<const X*>(x);
            W* ys = static_cast<W*>(y);
#pragma omp parallel for schedule(static) if (N * D >= kParallelElements)
            for (int64_t n = 0; n < N; ++n) {
                const X* row = xs + n * D;
                rstd[n] = rstd_of(sum_of_squares(row, D), D, eps);
                scale_row(row, static_cast<const W*>(w), rstd[n], ys + n * D, D);
            }
        });
    });
    return known ? 0 : kBadDType;
}

int64_t rms_norm_backward(const void* dy, const void* x, const void* w, const float* rstd, void* dx, int64_t N,
                          int64_t D, int64_t x_dtype, int64_t w_dtype, void* /*stream*/) {
    bool known = false;
    with_type(x_dtype, [&](auto x_type) {
        known = with_type(w_dtype, [&](auto w_type) {
            using X = decltype(x_type);
            using W = decltype(w_type);
#pragma omp parallel for schedule(static) if (N * D >= kParallelElements)
            for (int64_t n = 0; n < N; ++n) {
                X* out = static_cast<X*>(dx) + n * D;
                backward_row(static_cast<const W*>(dy) + n * D, static_cast<const X*>(x) + n * D,
                             static_cast<const W*>(w), rstd[n], D,
                             [&](int64_t d, vfloat value) { store_at(out, d, D, value); });
            }
        });
    });
    return known ? 0 : kBadDType;
}

// torch.promote_types(x, residual): equal types stay, different ones meet in float32.
int64_t promote(int64_t a, int64_t b) { return a == b ? a : static_cast<int64_t>(fp::kFloat32); }

// h = residual + dropout(x), rounded to its storage type; the norm then reads the rounded row, as HF's does.
template <class H, class X, class R>
void add_row(const X* x, const R* residual, const float* factors, H* h, int64_t D) {
    for (int64_t d = 0; d < D; d += kLanes) {
        vfloat value = load_at(x, d, D);
        if (factors != nullptr) value *= load_at(factors, d, D);
        store_at(h, d, D, load_at(residual, d, D) + value);
    }
}

template <class X, class R>
using Promoted = std::conditional_t<std::is_same_v<X, R>, X, float>;

int64_t rms_norm_residual(const void* x, const void* residual, const void* w, const int64_t* seed, void* h, void* y,
                          float* rstd, int64_t N, int64_t D, double eps, double dropout_p, int64_t x_dtype,
                          int64_t residual_dtype, int64_t w_dtype, void* /*stream*/) {
    const Dropout dropout(seed, dropout_p);
    const int64_t h_dtype = promote(x_dtype, residual_dtype);
    bool known = true, memory = true;
#pragma omp parallel if (N * D >= kParallelElements)
    {
        float* factors =
            dropout.active() ? static_cast<float*>(malloc(static_cast<size_t>(D) * sizeof(float))) : nullptr;
        const bool ready = factors != nullptr || !dropout.active();
        if (!ready) {
#pragma omp atomic write
            memory = false;
        }
#pragma omp for schedule(static)
        for (int64_t n = 0; n < N; ++n) {
            if (!ready) continue;
            if (dropout.active()) dropout.factors(n * D, D, factors);
            bool found = false;
            with_type(x_dtype, [&](auto x_type) {
                with_type(residual_dtype, [&](auto r_type) {
                    using X = decltype(x_type);
                    using R = decltype(r_type);
                    add_row(static_cast<const X*>(x) + n * D, static_cast<const R*>(residual) + n * D, factors,
                            static_cast<Promoted<X, R>*>(h) + n * D, D);
                });
            });
            with_type(h_dtype, [&](auto h_type) {
                found = with_type(w_dtype, [&](auto w_type) {
                    using H = decltype(h_type);
                    using W = decltype(w_type);
                    const H* row = static_cast<const H*>(h) + n * D;
                    rstd[n] = rstd_of(sum_of_squares(row, D), D, eps);
                    scale_row(row, static_cast<const W*>(w), rstd[n], static_cast<W*>(y) + n * D, D);
                });
            });
            if (!found) {
#pragma omp atomic write
                known = false;
            }
        }
        free(factors);
    }
    return !memory ? kNoMemory : known ? 0 : kBadDType;
}

template <class T>
void store_row(const float* row, const float* factors, T* out, int64_t D) {
    for (int64_t d = 0; d < D; d += kLanes) {
        vfloat value = load_at(row, d, D);
        if (factors != nullptr) value *= load_at(factors, d, D);
        store_at(out, d, D, value);
    }
}

// dh may be null (nobody used h); dx is null where it would equal dresidual.
int64_t rms_norm_residual_backward(const void* dy, const void* dh, const void* h, const void* w, const float* rstd,
                                   const int64_t* seed, void* dresidual, void* dx, int64_t N, int64_t D,
                                   double dropout_p, int64_t x_dtype, int64_t residual_dtype, int64_t w_dtype,
                                   void* /*stream*/) {
    const Dropout dropout(seed, dropout_p);
    const int64_t h_dtype = promote(x_dtype, residual_dtype);
    bool known = true, memory = true;
#pragma omp parallel if (N * D >= kParallelElements)
    {
        float* total = static_cast<float*>(malloc(2 * static_cast<size_t>(D) * sizeof(float)));
        float* factors = total + D;
        if (total == nullptr) {
#pragma omp atomic write
            memory = false;
        }
#pragma omp for schedule(static)
        for (int64_t n = 0; n < N; ++n) {
            if (total == nullptr) continue;
            bool found = false;
            with_type(h_dtype, [&](auto h_type) {
                found = with_type(w_dtype, [&](auto w_type) {
                    using H = decltype(h_type);
                    using W = decltype(w_type);
                    const H* above = dh == nullptr ? nullptr : static_cast<const H*>(dh) + n * D;
                    backward_row(static_cast<const W*>(dy) + n * D, static_cast<const H*>(h) + n * D,
                                 static_cast<const W*>(w), rstd[n], D, [&](int64_t d, vfloat value) {
                                     if (above != nullptr) value += load_at(above, d, D);
                                     store_at(total, d, D, value);
                                 });
                });
            });
            with_type(residual_dtype, [&](auto r_type) {
                store_row(total, nullptr, static_cast<decltype(r_type)*>(dresidual) + n * D, D);
            });
            if (dx != nullptr) {
                if (dropout.active()) dropout.factors(n * D, D, factors);
                with_type(x_dtype, [&](auto x_type) {
                    store_row(total, dropout.active() ? factors : nullptr, static_cast<decltype(x_type)*>(dx) + n * D,
                              D);
                });
            }
            if (!found) {
#pragma omp atomic write
                known = false;
            }
        }
        free(total);
    }
    return !memory ? kNoMemory : known ? 0 : kBadDType;
}

FP_KERNEL(rms_norm);
FP_KERNEL(rms_norm_backward);
FP_KERNEL(rms_norm_residual);
FP_KERNEL(rms_norm_residual_backward);

}  // namespace

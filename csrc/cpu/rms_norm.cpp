// SPDX-License-Identifier: Apache-2.0
// rms_norm on the CPU: a row at a time, read from memory once; the second pass over a row finds it in L1, and asks for
// the next row meanwhile. Formulas, shapes and dtypes: fastprompt/ops/rms_norm.py.
#include <math.h>

#include "common/dtype.h"
#include "common/kernel.h"
#include "cpu/dropout.h"
#include "cpu/memory.h"
#include "cpu/simd.h"

namespace {

float rstd_of(float sum_of_squares, int64_t D, double eps) {
    return 1.0f / sqrtf(sum_of_squares / static_cast<float>(D) + static_cast<float>(eps));
}

// The distance in elements from row n to the row after it; 0 for the last.
int64_t to_next_row(int64_t n, int64_t N, int64_t D) { return n + 1 < N ? D : 0; }

template <class X>
float sum_of_squares(const X* x, int64_t D) {
    RowSum sum;
    sum.add(D, [&](int64_t d, auto extent) {
        const vfloat value = load_at(x, d, extent);
        return value * value;
    });
    return sum.total();
}

// ahead(d) may fetch what the next row needs.
template <class X, class W, class Ahead>
void scale_row(const X* x, const W* w, float rstd, W* y, int64_t D, Put how, const Ahead& ahead) {
    each_vector(D, [&](int64_t d, auto extent) {
        ahead(d);
        store_at(y, d, extent, load_at(w, d, extent) * (load_at(x, d, extent) * rstd), how);
    });
}

// rstd^2 * mean(g * h) with g = dy * w.
template <class X, class W>
float slope_of(const W* dy, const X* x, const W* w, float rstd, int64_t D) {
    RowSum dot;
    dot.add(D, [&](int64_t d, auto extent) {
        return load_at(dy, d, extent) * load_at(w, d, extent) * load_at(x, d, extent);
    });
    return rstd * rstd * (dot.total() / static_cast<float>(D));
}

// dh = rstd * (g - h * slope) at one vector.
template <class X, class W, class Extent>
FP_INLINE vfloat backward_at(const W* dy, const X* x, const W* w, float rstd, float slope, int64_t d, Extent extent) {
    return rstd * (load_at(dy, d, extent) * load_at(w, d, extent) - load_at(x, d, extent) * slope);
}

int64_t rms_norm(const void* x, const void* w, void* y, float* rstd, int64_t N, int64_t D, double eps, int64_t x_dtype,
                 int64_t w_dtype, void* /*stream*/) {
    if (!is_dtype(x_dtype) || !is_dtype(w_dtype)) return fp::kBadOption;
    const Put how = put_rows(y, D * size_of(w_dtype), N);
    with_type(x_dtype, [&](auto x_type) {
        with_type(w_dtype, [&](auto w_type) {
            using X = decltype(x_type);
            using W = decltype(w_type);
#pragma omp parallel if (N * D >= kParallelElements)
            {
#pragma omp for schedule(static)
                for (int64_t n = 0; n < N; ++n) {
                    const X* row = static_cast<const X*>(x) + n * D;
                    const X* next = row + to_next_row(n, N, D);
                    rstd[n] = rstd_of(sum_of_squares(row, D), D, eps);
                    scale_row(row, static_cast<const W*>(w), rstd[n], static_cast<W*>(y) + n * D, D, how,
                              [next](int64_t d) { fetch(next + d); });
                }
                stream_fence();
            }
        });
    });
    return 0;
}

template <class X, class W>
void backward_row(const W* dy, const X* x, const W* w, float rstd, X* dx, int64_t D, int64_t next, Put how) {
    const float slope = slope_of(dy, x, w, rstd, D);
    each_vector(D, [&](int64_t d, auto extent) {
        fetch(dy + next + d);
        fetch(x + next + d);
        store_at(dx, d, extent, backward_at(dy, x, w, rstd, slope, d, extent), how);
    });
}

int64_t rms_norm_backward(const void* dy, const void* x, const void* w, const float* rstd, void* dx, int64_t N,
                          int64_t D, int64_t x_dtype, int64_t w_dtype, void* /*stream*/) {
    if (!is_dtype(x_dtype) || !is_dtype(w_dtype)) return fp::kBadOption;
    const Put how = put_rows(dx, D * size_of(x_dtype), N);
    with_type(x_dtype, [&](auto x_type) {
        with_type(w_dtype, [&](auto w_type) {
            using X = decltype(x_type);
            using W = decltype(w_type);
#pragma omp parallel if (N * D >= kParallelElements)
            {
#pragma omp for schedule(static)
                for (int64_t n = 0; n < N; ++n) {
                    backward_row(static_cast<const W*>(dy) + n * D, static_cast<const X*>(x) + n * D,
                                 static_cast<const W*>(w), rstd[n], static_cast<X*>(dx) + n * D, D,
                                 to_next_row(n, N, D), how);
                }
                stream_fence();
            }
        });
    });
    return 0;
}

// h = residual + dropout(x), rounded to its storage type: the norm reads the rounded row, as HF's does.
template <class H, class X, class R>
void add_row(const X* x, const R* residual, const float* factors, H* h, int64_t count, Put how, RowSum* squares) {
    squares->add(count, [&](int64_t d, auto extent) {
        vfloat value = load_at(x, d, extent);
        if (factors != nullptr) value = drop(value, load_at(factors, d, extent));
        store_at(h, d, extent, load_at(residual, d, extent) + value, how);
        value = load_at(h, d, extent);
        return value * value;
    });
}

template <class X, class R>
using Promoted = std::conditional_t<std::is_same_v<X, R>, X, float>;

int64_t rms_norm_residual(const void* x, const void* residual, const void* w, const int64_t* seed, void* h, void* y,
                          float* rstd, int64_t N, int64_t D, double eps, double dropout_p, int64_t x_dtype,
                          int64_t residual_dtype, int64_t w_dtype, void* /*stream*/) {
    if (!is_dtype(x_dtype) || !is_dtype(residual_dtype) || !is_dtype(w_dtype)) return fp::kBadOption;
    const Dropout dropout(seed, dropout_p);
    const int64_t h_dtype = promoted(x_dtype, residual_dtype);
    const int64_t x_size = size_of(x_dtype), residual_size = size_of(residual_dtype);
    const Put how = put_rows(y, D * size_of(w_dtype), N), put_h = put_in_passing(dropout.active());
#pragma omp parallel if (N * D >= kParallelElements)
    {
#pragma omp for schedule(static)
        for (int64_t n = 0; n < N; ++n) {
            RowSum squares;
            with_type(x_dtype, [&](auto x_type) {
                with_type(residual_dtype, [&](auto r_type) {
                    using X = decltype(x_type);
                    using R = decltype(r_type);
                    each_chunk(D, [&](int64_t begin, int64_t count) {
                        float factors[kChunk];
                        const int64_t first = n * D + begin;
                        if (dropout.active()) dropout.factors(first, count, factors);
                        add_row(static_cast<const X*>(x) + first, static_cast<const R*>(residual) + first,
                                dropout.active() ? factors : nullptr, static_cast<Promoted<X, R>*>(h) + first, count,
                                put_h, &squares);
                    });
                });
            });
            rstd[n] = rstd_of(squares.total(), D, eps);
            const int64_t next = n * D + to_next_row(n, N, D);
            const char* next_x = static_cast<const char*>(x) + next * x_size;
            const char* next_residual = static_cast<const char*>(residual) + next * residual_size;
            with_type(h_dtype, [&](auto h_type) {
                with_type(w_dtype, [&](auto w_type) {
                    using W = decltype(w_type);
                    scale_row(static_cast<const decltype(h_type)*>(h) + n * D, static_cast<const W*>(w), rstd[n],
                              static_cast<W*>(y) + n * D, D, how, [=](int64_t d) {
                                  fetch(next_x + d * x_size);
                                  fetch(next_residual + d * residual_size);
                              });
                });
            });
        }
        stream_fence();
    }
    return 0;
}

template <class T>
void store_row(const float* row, const float* factors, T* out, int64_t count, Put how) {
    each_vector(count, [&](int64_t d, auto extent) {
        vfloat value = load_at(row, d, extent);
        if (factors != nullptr) value = drop(value, load_at(factors, d, extent));
        store_at(out, d, extent, value, how);
    });
}

// The gradient of h at `count` elements: the norm's, and what came to h itself (`above` may be null). `put` takes it.
// Of four rows of the first-level cache there is no room for a next one: it is asked for into the second.
template <class H, class W, class PutAt>
FP_INLINE void total_row(const W* dy, const H* above, const H* h, const W* w, float rstd, float slope, int64_t count,
                         int64_t next, const PutAt& put) {
    each_vector(count, [&](int64_t d, auto extent) {
        fetch_outer(dy + next + d);
        fetch_outer(h + next + d);
        vfloat value = backward_at(dy, h, w, rstd, slope, d, extent);
        if (above != nullptr) {
            fetch_outer(above + next + d);
            value += load_at(above, d, extent);
        }
        put(d, extent, value);
    });
}

struct ResidualBackward {
    const void *dy, *dh, *h, *w;  // dh may be null: nobody used h
    const float* rstd;
    void *dresidual, *dx;  // dx is null where it would equal dresidual
    int64_t N, D, x_dtype, residual_dtype;
    Dropout dropout;

    template <class H, class W>
    void row(int64_t n, Put put_residual, Put put_x) const {
        const int64_t first = n * D, next = to_next_row(n, N, D);
        const W *dys = static_cast<const W*>(dy) + first, *ws = static_cast<const W*>(w);
        const H* hs = static_cast<const H*>(h) + first;
        const H* above = dh == nullptr ? nullptr : static_cast<const H*>(dh) + first;
        const float slope = slope_of(dys, hs, ws, rstd[n], D);
        if (dx == nullptr) {  // and dresidual is of h's type
            H* out = static_cast<H*>(dresidual) + first;
            total_row(dys, above, hs, ws, rstd[n], slope, D, next,
                      [&](int64_t d, auto extent, vfloat value) { store_at(out, d, extent, value, put_residual); });
            return;
        }
        each_chunk(D, [&](int64_t begin, int64_t count) {
            float total[kChunk], factors[kChunk];
            total_row(dys + begin, above == nullptr ? nullptr : above + begin, hs + begin, ws + begin, rstd[n], slope,
                      count, next,
                      [&](int64_t d, auto extent, vfloat value) { store_at(total, d, extent, value, Put::kPlain); });
            with_type(residual_dtype, [&](auto type) {
                auto* out = static_cast<decltype(type)*>(dresidual) + first + begin;
                store_row(total, nullptr, out, count, put_residual);
            });
            if (dropout.active()) dropout.factors(first + begin, count, factors);
            with_type(x_dtype, [&](auto type) {
                auto* out = static_cast<decltype(type)*>(dx) + first + begin;
                store_row(total, dropout.active() ? factors : nullptr, out, count, put_x);
            });
        });
    }
};

int64_t rms_norm_residual_backward(const void* dy, const void* dh, const void* h, const void* w, const float* rstd,
                                   const int64_t* seed, void* dresidual, void* dx, int64_t N, int64_t D,
                                   double dropout_p, int64_t x_dtype, int64_t residual_dtype, int64_t w_dtype,
                                   void* /*stream*/) {
    if (!is_dtype(x_dtype) || !is_dtype(residual_dtype) || !is_dtype(w_dtype)) return fp::kBadOption;
    const ResidualBackward call{dy, dh, h, w,       rstd,           dresidual,
                                dx, N,  D, x_dtype, residual_dtype, Dropout(seed, dropout_p)};
    const int64_t h_dtype = promoted(x_dtype, residual_dtype);
    const Put put_residual = put_rows(dresidual, D * size_of(residual_dtype), N, put_in_passing(call.dropout.active()));
    const Put put_x = put_rows(dx, D * size_of(x_dtype), N);
#pragma omp parallel if (N * D >= kParallelElements)
    {
#pragma omp for schedule(static)
        for (int64_t n = 0; n < N; ++n) {
            with_type(h_dtype, [&](auto h_type) {
                with_type(w_dtype,
                          [&](auto w_type) { call.row<decltype(h_type), decltype(w_type)>(n, put_residual, put_x); });
            });
        }
        stream_fence();
    }
    return 0;
}

FP_KERNEL(rms_norm);
FP_KERNEL(rms_norm_backward);
FP_KERNEL(rms_norm_residual);
FP_KERNEL(rms_norm_residual_backward);

}  // namespace

// SPDX-License-Identifier: Apache-2.0
// rms_norm and its residual form, forward and backward: fastprompt/ops/rms_norm.py has the formulas.
//
// Memory-bound: every tensor is read or written once. A team of threads (rows.h) holds its row in registers between
// the sum and the scaling. Of a row too long for that it holds the last part, and loads the others a second time.
#include "common/kernel.h"
#include "cuda/dropout.h"
#include "cuda/rows.h"
#include "cuda/vector.h"

namespace {

struct Forward {
    const void *x, *residual, *w;  // [N, D], [N, D], [D]
    void *h, *y;                   // [N, D]
    float* rstd;                   // [N]
    int64_t N, D;
    float eps;
    Dropout dropout;
    fp::DType x_type, residual_type, h_type, w_type;  // y has w's
};

template <int V, int Mix, bool kResidual>
__global__ void __launch_bounds__(kMaxTeam) norm_rows(const Forward a) {
    const fp::DType x_type = type_of<Mix>(a.x_type), residual_type = type_of<Mix>(a.residual_type);
    const fp::DType h_type = type_of<Mix>(a.h_type), w_type = type_of<Mix>(a.w_type);
    const Share<V> share(a.D);
    const DropoutKey key(a.dropout);
    for (int64_t row = first_row(); row < a.N; row += row_step()) {
        const int64_t start = row * a.D;
        Vector<V> h[kHeld<V>], w[kHeld<V>];
        float squares = 0.0f;
        for (int part = 0; part < share.parts; ++part) {
            Vector<V> residual[kHeld<V>];
#pragma unroll
            for (int j = 0; j < kHeld<V>; ++j) {
                const int64_t i = share.at(part, j);
                if (i >= share.count) continue;
                h[j] = load<V>(a.x, start + i * V, x_type);
                if (kResidual) residual[j] = load<V>(a.residual, start + i * V, residual_type);
                w[j] = load<V>(a.w, i * V, w_type);
            }
#pragma unroll
            for (int j = 0; j < kHeld<V>; ++j) {
                const int64_t i = share.at(part, j);
                if (i >= share.count) continue;
                float value[V];
                unpack(h[j], x_type, value);
                if constexpr (kResidual) {
                    float stream[V];
                    unpack(residual[j], residual_type, stream);
                    drop(value, key, start + i * V);
#pragma unroll
                    for (int k = 0; k < V; ++k) value[k] += stream[k];
                    h[j] = pack(value, h_type);
                    store(a.h, start + i * V, h_type, h[j]);
                    unpack(h[j], h_type, value);  // the norm is that of h as stored
                }
#pragma unroll
                for (int k = 0; k < V; ++k) squares += value[k] * value[k];
            }
        }
        const float rstd = __frsqrt_rn(team_sum(squares) / static_cast<float>(a.D) + a.eps);
        if (threadIdx.x == 0) a.rstd[row] = rstd;
        for (int part = share.parts - 1; part >= 0; --part) {
#pragma unroll
            for (int j = 0; j < kHeld<V>; ++j) {
                const int64_t i = share.at(part, j);
                if (i >= share.count) continue;
                if (part < share.parts - 1) {
                    h[j] = load<V>(kResidual ? a.h : a.x, start + i * V, h_type);
                    w[j] = load<V>(a.w, i * V, w_type);
                }
                float value[V], scale[V];
                unpack(h[j], h_type, value);
                unpack(w[j], w_type, scale);
#pragma unroll
                for (int k = 0; k < V; ++k) value[k] = scale[k] * (value[k] * rstd);
                store(a.y, start + i * V, w_type, pack(value, w_type));
            }
        }
    }
}

struct Backward {
    const void *dy, *dh, *h, *w;  // [N, D], [N, D] or null, [N, D], [D]
    const float* rstd;            // [N]
    void *dresidual, *dx;         // [N, D], [N, D] or null; without a residual, dresidual is the gradient of x
    int64_t N, D;
    Dropout dropout;
    fp::DType h_type, w_type, residual_type, x_type;  // dh has h's, dy has w's
};

template <int V, int Mix, bool kResidual>
__global__ void __launch_bounds__(kMaxTeam) norm_rows_backward(const Backward a) {
    const fp::DType h_type = type_of<Mix>(a.h_type), w_type = type_of<Mix>(a.w_type);
    const fp::DType residual_type = type_of<Mix>(a.residual_type), x_type = type_of<Mix>(a.x_type);
    const Share<V> share(a.D);
    const DropoutKey key(a.dropout);
    for (int64_t row = first_row(); row < a.N; row += row_step()) {
        const int64_t start = row * a.D;
        const float rstd = a.rstd[row];
        Vector<V> dy[kHeld<V>], dh[kHeld<V>], h[kHeld<V>], w[kHeld<V>];
        const auto load_part = [&](int part) {
#pragma unroll
            for (int j = 0; j < kHeld<V>; ++j) {
                const int64_t i = share.at(part, j);
                if (i >= share.count) continue;
                dy[j] = load<V>(a.dy, start + i * V, w_type);
                h[j] = load<V>(a.h, start + i * V, h_type);
                w[j] = load<V>(a.w, i * V, w_type);
                if (kResidual && a.dh != nullptr) dh[j] = load<V>(a.dh, start + i * V, h_type);
            }
        };
        float products = 0.0f;
        for (int part = 0; part < share.parts; ++part) {
            load_part(part);
#pragma unroll
            for (int j = 0; j < kHeld<V>; ++j) {
                if (share.at(part, j) >= share.count) continue;
                float g[V], scale[V], value[V];
                unpack(dy[j], w_type, g);
                unpack(w[j], w_type, scale);
                unpack(h[j], h_type, value);
#pragma unroll
                for (int k = 0; k < V; ++k) products += g[k] * scale[k] * value[k];
            }
        }
        const float slope = rstd * rstd * (team_sum(products) / static_cast<float>(a.D));
        for (int part = share.parts - 1; part >= 0; --part) {
            if (part < share.parts - 1) load_part(part);
#pragma unroll
            for (int j = 0; j < kHeld<V>; ++j) {
                const int64_t i = share.at(part, j);
                if (i >= share.count) continue;
                float g[V], scale[V], value[V];
                unpack(dy[j], w_type, g);
                unpack(w[j], w_type, scale);
                unpack(h[j], h_type, value);
#pragma unroll
                for (int k = 0; k < V; ++k) g[k] = rstd * (g[k] * scale[k] - value[k] * slope);
                if (kResidual && a.dh != nullptr) {
                    unpack(dh[j], h_type, value);
#pragma unroll
                    for (int k = 0; k < V; ++k) g[k] += value[k];
                }
                store(a.dresidual, start + i * V, residual_type, pack(g, residual_type));
                if (kResidual && a.dx != nullptr) {
                    drop(g, key, start + i * V);
                    store(a.dx, start + i * V, x_type, pack(g, x_type));
                }
            }
        }
    }
}

template <bool kResidual>
int64_t launch_forward(const Forward& a, void* stream) {
    const Operand operands[] = {
        {a.x, a.x_type}, {a.residual, a.residual_type}, {a.h, a.h_type}, {a.y, a.w_type}, {a.w, a.w_type}};
    return with_vectors(a.D, operands, [&](auto V, auto Mix) {
        return launch_rows<V>(norm_rows<V, Mix, kResidual>, a.N, a.D, stream, a);
    });
}

template <bool kResidual>
int64_t launch_backward(const Backward& a, void* stream) {
    const Operand operands[] = {
        {a.h, a.h_type}, {a.dy, a.w_type}, {a.dh, a.h_type}, {a.w, a.w_type}, {a.dresidual, a.residual_type},
        {a.dx, a.x_type}};
    return with_vectors(a.D, operands, [&](auto V, auto Mix) {
        return launch_rows<V>(norm_rows_backward<V, Mix, kResidual>, a.N, a.D, stream, a);
    });
}

int64_t rms_norm(const void* x, const void* w, void* y, float* rstd, int64_t N, int64_t D, double eps, int64_t x_dtype,
                 int64_t w_dtype, void* stream) {
    const fp::DType type = dtype(x_dtype);
    return launch_forward<false>({x, nullptr, w, nullptr, y, rstd, N, D, static_cast<float>(eps),
                                  make_dropout(nullptr, 0.0), type, type, type, dtype(w_dtype)},
                                 stream);
}

int64_t rms_norm_backward(const void* dy, const void* x, const void* w, const float* rstd, void* dx, int64_t N,
                          int64_t D, int64_t x_dtype, int64_t w_dtype, void* stream) {
    const fp::DType type = dtype(x_dtype);
    return launch_backward<false>(
        {dy, nullptr, x, w, rstd, dx, nullptr, N, D, make_dropout(nullptr, 0.0), type, dtype(w_dtype), type, type},
        stream);
}

int64_t rms_norm_residual(const void* x, const void* residual, const void* w, const int64_t* seed, void* h, void* y,
                          float* rstd, int64_t N, int64_t D, double eps, double dropout_p, int64_t x_dtype,
                          int64_t residual_dtype, int64_t w_dtype, void* stream) {
    const fp::DType x_type = dtype(x_dtype), residual_type = dtype(residual_dtype);
    return launch_forward<true>(
        {x, residual, w, h, y, rstd, N, D, static_cast<float>(eps), make_dropout(seed, dropout_p), x_type,
         residual_type, dtype(promoted(x_dtype, residual_dtype)), dtype(w_dtype)},
        stream);
}

int64_t rms_norm_residual_backward(const void* dy, const void* dh, const void* h, const void* w, const float* rstd,
                                   const int64_t* seed, void* dresidual, void* dx, int64_t N, int64_t D,
                                   double dropout_p, int64_t x_dtype, int64_t residual_dtype, int64_t w_dtype,
                                   void* stream) {
    const fp::DType x_type = dtype(x_dtype), residual_type = dtype(residual_dtype);
    return launch_backward<true>({dy, dh, h, w, rstd, dresidual, dx, N, D, make_dropout(seed, dropout_p),
                                  dtype(promoted(x_dtype, residual_dtype)), dtype(w_dtype), residual_type, x_type},
                                 stream);
}

FP_KERNEL(rms_norm);
FP_KERNEL(rms_norm_backward);
FP_KERNEL(rms_norm_residual);
FP_KERNEL(rms_norm_residual_backward);

}  // namespace

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

// Vectors that a thread holds. 32 elements: a warp covers D = 1024, a block D = 8192.
template <int V>
constexpr int kHeld = V == 1 ? 8 : 32 / V;

template <int V, int C>
__device__ __forceinline__ float dot(const float (&a)[C][V], const float (&b)[C][V]) {
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < C; ++j) {
#pragma unroll
        for (int k = 0; k < V; ++k) sum += a[j][k] * b[j][k];
    }
    return sum;
}

template <int V, int C, class F>
__device__ __forceinline__ void update(float (&a)[C][V], const float (&b)[C][V], F function) {
#pragma unroll
    for (int j = 0; j < C; ++j) {
#pragma unroll
        for (int k = 0; k < V; ++k) a[j][k] = function(a[j][k], b[j][k]);
    }
}

struct Forward {
    const void *x, *residual, *w;  // [N, D], [N, D], [D]
    void *h, *y;                   // [N, D]
    float* rstd;                   // [N]
    int64_t N, D;
    float eps;
    Dropout dropout;
    fp::DType x_type, residual_type, h_type, w_type;  // y has w's
};

template <int V, bool kResidual>
__global__ void __launch_bounds__(kMaxTeam) forward(const Forward a) {
    constexpr int C = kHeld<V>;
    const int vectors = static_cast<int>(a.D / V), threads = static_cast<int>(blockDim.x);
    const int last = (vectors - 1) / (C * threads) * (C * threads);  // where the part that is held begins
    for (int64_t row = first_row(); row < a.N; row += row_step()) {
        const int64_t start = row * a.D;
        Packed<V, C> packed, w;
        float h[C][V], other[C][V];
        float squares = 0.0f;
        for (int part = 0; part <= last; part += C * threads) {
            const Columns columns = {part + static_cast<int>(threadIdx.x), threads, vectors};
            Packed<V, C> residual;
            load(packed, a.x, start, a.x_type, columns);
            if constexpr (kResidual) load(residual, a.residual, start, a.residual_type, columns);
            load(w, a.w, 0, a.w_type, columns);
            unpack(packed, a.x_type, h);
            if constexpr (kResidual) {
                drop(h, a.dropout, start, columns);
                unpack(residual, a.residual_type, other);
                update(h, other, [](float x, float residual) { return residual + x; });
                pack(h, a.h_type, packed);
                store(a.h, start, a.h_type, columns, packed);
                unpack(packed, a.h_type, h);  // the norm is that of h as stored
            }
            squares += dot(h, h);
        }
        const float rstd = __frsqrt_rn(team_sum(squares) / static_cast<float>(a.D) + a.eps);
        if (threadIdx.x == 0) a.rstd[row] = rstd;
        for (int part = last; part >= 0; part -= C * threads) {
            const Columns columns = {part + static_cast<int>(threadIdx.x), threads, vectors};
            if (part != last) {
                load(packed, kResidual ? a.h : a.x, start, a.h_type, columns);
                load(w, a.w, 0, a.w_type, columns);
                unpack(packed, a.h_type, h);
            }
            unpack(w, a.w_type, other);
            update(h, other, [rstd](float h, float w) { return w * (h * rstd); });
            pack(h, a.w_type, packed);
            store(a.y, start, a.w_type, columns, packed);
        }
    }
}

struct Backward {
    const void *dy, *dh, *h, *w;  // [N, D], [N, D] or null, [N, D], [D]
    const float* rstd;            // [N]
    void *dresidual, *dx;         // [N, D], [N, D] or null; without a residual, dresidual is x's gradient
    int64_t N, D;
    Dropout dropout;
    fp::DType h_type, w_type, residual_type, x_type;  // dh has h's, dy has w's
};

template <int V, bool kResidual>
__global__ void __launch_bounds__(kMaxTeam) backward(const Backward a) {
    constexpr int C = kHeld<V>;
    const int vectors = static_cast<int>(a.D / V), threads = static_cast<int>(blockDim.x);
    const int last = (vectors - 1) / (C * threads) * (C * threads);  // where the part that is held begins
    for (int64_t row = first_row(); row < a.N; row += row_step()) {
        const int64_t start = row * a.D;
        const float rstd = a.rstd[row];
        Packed<V, C> h, dh, packed;
        float g[C][V], other[C][V];
        const auto load_part = [&](const Columns& columns) {
            Packed<V, C> w;
            load(packed, a.dy, start, a.w_type, columns);
            load(h, a.h, start, a.h_type, columns);
            load(w, a.w, 0, a.w_type, columns);
            if (kResidual && a.dh != nullptr) load(dh, a.dh, start, a.h_type, columns);
            unpack(packed, a.w_type, g);
            unpack(w, a.w_type, other);
            update(g, other, [](float dy, float w) { return dy * w; });
            unpack(h, a.h_type, other);
        };
        float products = 0.0f;
        for (int part = 0; part <= last; part += C * threads) {
            load_part({part + static_cast<int>(threadIdx.x), threads, vectors});
            products += dot(g, other);
        }
        const float slope = rstd * rstd * (team_sum(products) / static_cast<float>(a.D));
        for (int part = last; part >= 0; part -= C * threads) {
            const Columns columns = {part + static_cast<int>(threadIdx.x), threads, vectors};
            if (part != last) load_part(columns);
            unpack(h, a.h_type, other);
            update(g, other, [=](float g, float h) { return rstd * (g - h * slope); });
            if (kResidual && a.dh != nullptr) {
                unpack(dh, a.h_type, other);
                update(g, other, [](float g, float dh) { return g + dh; });
            }
            pack(g, a.residual_type, packed);
            store(a.dresidual, start, a.residual_type, columns, packed);
            if (kResidual && a.dx != nullptr) {
                drop(g, a.dropout, start, columns);
                pack(g, a.x_type, packed);
                store(a.dx, start, a.x_type, columns, packed);
            }
        }
    }
}

template <bool kResidual>
int64_t launch_forward(const Forward& a, void* stream) {
    if (a.N == 0 || a.D == 0) return 0;
    const int width = vector_width(a.D, {{a.x, a.x_type}, {a.residual, a.residual_type}, {a.h, a.h_type}, {a.y, a.w_type}, {a.w, a.w_type}});
    return with_width(width, [&](auto V) {
        const RowLaunch rows = row_launch(a.N, a.D / V, kHeld<V>);
        return launch(forward<V, kResidual>, rows.grid, rows.block, 0, stream, a);
    });
}

template <bool kResidual>
int64_t launch_backward(const Backward& a, void* stream) {
    if (a.N == 0 || a.D == 0) return 0;
    const int width = vector_width(a.D, {{a.dy, a.w_type}, {a.dh, a.h_type}, {a.h, a.h_type}, {a.w, a.w_type}, {a.dresidual, a.residual_type}, {a.dx, a.x_type}});
    return with_width(width, [&](auto V) {
        const RowLaunch rows = row_launch(a.N, a.D / V, kHeld<V>);
        return launch(backward<V, kResidual>, rows.grid, rows.block, 0, stream, a);
    });
}

// torch.promote_types
fp::DType promoted(fp::DType a, fp::DType b) { return a == b ? a : fp::kFloat32; }

int64_t rms_norm(const void* x, const void* w, void* y, float* rstd, int64_t N, int64_t D, double eps, int64_t x_dtype,
                 int64_t w_dtype, void* stream) {
    const fp::DType x_type = static_cast<fp::DType>(x_dtype), w_type = static_cast<fp::DType>(w_dtype);
    return launch_forward<false>({x, nullptr, w, nullptr, y, rstd, N, D, static_cast<float>(eps), {}, x_type, x_type, x_type, w_type}, stream);
}

int64_t rms_norm_backward(const void* dy, const void* x, const void* w, const float* rstd, void* dx, int64_t N,
                          int64_t D, int64_t x_dtype, int64_t w_dtype, void* stream) {
    const fp::DType x_type = static_cast<fp::DType>(x_dtype), w_type = static_cast<fp::DType>(w_dtype);
    return launch_backward<false>({dy, nullptr, x, w, rstd, dx, nullptr, N, D, {}, x_type, w_type, x_type, x_type}, stream);
}

int64_t rms_norm_residual(const void* x, const void* residual, const void* w, const int64_t* seed, void* h, void* y,
                          float* rstd, int64_t N, int64_t D, double eps, double dropout_p, int64_t x_dtype,
                          int64_t residual_dtype, int64_t w_dtype, void* stream) {
    const fp::DType x_type = static_cast<fp::DType>(x_dtype), residual_type = static_cast<fp::DType>(residual_dtype);
    return launch_forward<true>({x, residual, w, h, y, rstd, N, D, static_cast<float>(eps), make_dropout(seed, dropout_p), x_type,
                         residual_type, promoted(x_type, residual_type), static_cast<fp::DType>(w_dtype)},
                        stream);
}

int64_t rms_norm_residual_backward(const void* dy, const void* dh, const void* h, const void* w, const float* rstd,
                                   const int64_t* seed, void* dresidual, void* dx, int64_t N, int64_t D,
                                   double dropout_p, int64_t x_dtype, int64_t residual_dtype, int64_t w_dtype,
                                   void* stream) {
    const fp::DType x_type = static_cast<fp::DType>(x_dtype), residual_type = static_cast<fp::DType>(residual_dtype);
    return launch_backward<true>({dy, dh, h, w, rstd, dresidual, dx, N, D, make_dropout(seed, dropout_p),
                          promoted(x_type, residual_type), static_cast<fp::DType>(w_dtype), residual_type, x_type},
                         stream);
}

FP_KERNEL(rms_norm);
FP_KERNEL(rms_norm_backward);
FP_KERNEL(rms_norm_residual);
FP_KERNEL(rms_norm_residual_backward);

}  // namespace

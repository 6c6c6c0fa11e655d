// SPDX-License-Identifier: Apache-2.0
// gated_act on the CPU: one pass over the tensors, whatever their shape. Formulas: fastprompt/ops/gated_act.py.
#include "common/act.h"
#include "common/kernel.h"
#include "cpu/dropout.h"
#include "cpu/exp.h"
#include "cpu/memory.h"
#include "cpu/simd.h"

namespace {

using fp::Act, fp::kGeluNew, fp::kGelu, fp::kSilu, fp::kTwice, fp::kCubic, fp::kRootHalf, fp::kDensityAt0;

FP_INLINE vfloat horner(vfloat x, const float* coefficients, int count) {
    vfloat sum = splat(coefficients[count - 1]);
    for (int i = count - 2; i >= 0; --i) sum = fused_multiply_add(sum, x, splat(coefficients[i]));
    return sum;
}

// erf: an even polynomial inside [-1, 1], one minus the exponential of a polynomial outside. Both were fitted to 1e-9.
FP_INLINE vfloat erf(vfloat z) {
    constexpr float kInside[] = {1.12837917e+0f, -3.76126271e-1f, 1.12836002e-1f, -2.68544446e-2f,
                                 5.18953545e-3f, -8.02084226e-4f, 7.88912280e-5f};
    constexpr float kOutside[] = {-3.53718760e-4f, -1.12704004e+0f, -6.38225672e-1f, -1.03037373e-1f,
                                  2.18053206e-2f,  -2.93960789e-3f, 1.85574071e-4f};
    const vfloat size = z < 0.0f ? -z : z;
    const vfloat inside = z * horner(z * z, kInside, 7);
    const vfloat bounded = size > 4.0f ? splat(4.0f) : size;  // erf(4) rounds to 1; NaN passes
    const vfloat outside = 1.0f - exp(horner(bounded, kOutside, 7));
    return size <= 1.0f ? inside : (z < 0.0f ? -outside : outside);
}

struct Curve {
    vfloat value, slope;  // act(x), act'(x)
};

// kGeluNew and kSilu are x * sigmoid(v(x)): 1 + tanh(u) = 2 sigmoid(2u) without the cancellation.
template <Act kAct>
FP_INLINE Curve curve(vfloat x) {
    if constexpr (kAct == kGelu) {
        const vfloat cdf = 0.5f * (1.0f + erf(x * kRootHalf));
        return {x * cdf, cdf + x * (kDensityAt0 * exp(-0.5f * (x * x)))};
    } else {
        const vfloat square = x * x;
        const vfloat v = kAct == kSilu ? x : kTwice * x * (1.0f + kCubic * square);
        const vfloat e = exp(v < 0.0f ? v : -v), near = 1.0f / (1.0f + e);
        const vfloat s = v < 0.0f ? e * near : near;  // sigmoid(v)
        const vfloat bend = e * near * near;          // s * (1 - s) without the cancellation
        const vfloat steepness = kAct == kSilu ? splat(1.0f) : kTwice * (1.0f + 3.0f * kCubic * square);
        // Far out the bend is zero, and infinity times zero is no number.
        return {x * s, bend == 0.0f ? s : s + x * bend * steepness};
    }
}

template <class Visit>
void with_act(int64_t act, const Visit& visit) {
    switch (act) {
        case kGeluNew: return visit(std::integral_constant<Act, kGeluNew>{});
        case kGelu: return visit(std::integral_constant<Act, kGelu>{});
        default: return visit(std::integral_constant<Act, kSilu>{});
    }
}

bool are_valid(int64_t act, int64_t dtype) { return act >= kGeluNew && act <= kSilu && is_dtype(dtype); }

int64_t gated_act(const void* a, const void* b, const int64_t* seed, void* y, int64_t count, int64_t act,
                  double dropout_p, int64_t dtype, void* /*stream*/) {
    if (!are_valid(act, dtype)) return fp::kBadOption;
    const Dropout dropout(seed, dropout_p);
    with_type(dtype, [&](auto type) {
        with_act(act, [&](auto kind) {
            using T = decltype(type);
            const T *as = static_cast<const T*>(a), *bs = static_cast<const T*>(b);
            T* ys = static_cast<T*>(y);
            const Put how = put_in_passing(dropout.active());
            each_chunk_parallel(count, [&](int64_t first, int64_t size) {
                with_factors(dropout, first, size, [&](const auto& factor_at) {
                    each_vector(size, [&](int64_t i, auto extent) {
                        const vfloat gate = curve<kind>(load_at(as + first, i, extent)).value;
                        const vfloat value = gate * load_at(bs + first, i, extent);
                        store_at(ys + first, i, extent, drop(value, factor_at(i, extent)), how);
                    });
                });
            });
        });
    });
    return 0;
}

int64_t gated_act_backward(const void* dy, const void* a, const void* b, const int64_t* seed, void* da, void* db,
                           int64_t count, int64_t act, double dropout_p, int64_t dtype, void* /*stream*/) {
    if (!are_valid(act, dtype)) return fp::kBadOption;
    const Dropout dropout(seed, dropout_p);
    with_type(dtype, [&](auto type) {
        with_act(act, [&](auto kind) {
            using T = decltype(type);
            const T *dys = static_cast<const T*>(dy), *as = static_cast<const T*>(a), *bs = static_cast<const T*>(b);
            T *das = static_cast<T*>(da), *dbs = static_cast<T*>(db);
            const Put how = put_in_passing(dropout.active());
            each_chunk_parallel(count, [&](int64_t first, int64_t size) {
                with_factors(dropout, first, size, [&](const auto& factor_at) {
                    each_vector(size, [&](int64_t i, auto extent) {
                        const vfloat grad = drop(load_at(dys + first, i, extent), factor_at(i, extent));
                        const Curve gate = curve<kind>(load_at(as + first, i, extent));
                        store_at(das + first, i, extent, grad * load_at(bs + first, i, extent) * gate.slope, how);
                        store_at(dbs + first, i, extent, grad * gate.value, how);
                    });
                });
            });
        });
    });
    return 0;
}

FP_KERNEL(gated_act);
FP_KERNEL(gated_act_backward);

}  // namespace

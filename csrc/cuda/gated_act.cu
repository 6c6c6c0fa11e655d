// SPDX-License-Identifier: Apache-2.0
// gated_act, forward and backward: fastprompt/ops/gated_act.py has the formulas. Memory-bound: one pass.
#include "common/act.h"
#include "common/kernel.h"
#include "cuda/dropout.h"
#include "cuda/elements.h"
#include "cuda/vector.h"

namespace {

using fp::Act, fp::kGeluNew, fp::kGelu, fp::kSilu, fp::kTwice, fp::kCubic, fp::kRootHalf, fp::kDensityAt0;

struct Gate {
    const void *a, *b, *dy;  // dy: backward only
    void *y, *da, *db;       // y: forward only
    int64_t count;
    Dropout dropout;
    fp::DType type;
};

struct Curve {
    float value, slope;  // act(x), act'(x)
};

template <Act kAct>
__device__ __forceinline__ Curve curve(float x) {
    if constexpr (kAct == kGelu) {
        const float cdf = 0.5f * (1.0f + erff(x * kRootHalf));
        return {x * cdf, cdf + x * (kDensityAt0 * expf(-0.5f * (x * x)))};
    } else {
        const float square = x * x;
        const float v = kAct == kSilu ? x : kTwice * x * (1.0f + kCubic * square);
        const float e = expf(-fabsf(v)), near = 1.0f / (1.0f + e);
        const float s = v < 0.0f ? e * near : near;  // sigmoid(v)
        const float bend = e * near * near;          // s * (1 - s) without the cancellation
        const float steepness = kAct == kSilu ? 1.0f : kTwice * (1.0f + 3.0f * kCubic * square);
        // Far out the bend is zero, and infinity times zero is no number.
        return {x * s, bend == 0.0f ? s : s + x * bend * steepness};
    }
}

template <int V, int Mix, Act kAct, bool kBackward>
__global__ void __launch_bounds__(kElementThreads) gate_elements(const Gate g) {
    const fp::DType type = type_of<Mix>(g.type);
    const DropoutKey key(g.dropout);
    for (int64_t i = first_element(V); i < g.count; i += element_stride(V)) {
        float a[V], b[V], out[V];
        unpack(load<V>(g.a, i, type), type, a);
        unpack(load<V>(g.b, i, type), type, b);
        if constexpr (kBackward) {
            unpack(load<V>(g.dy, i, type), type, out);
            drop(out, key, i);
#pragma unroll
            for (int k = 0; k < V; ++k) {
                const Curve gate = curve<kAct>(a[k]);
                a[k] = out[k] * b[k] * gate.slope;
                b[k] = out[k] * gate.value;
            }
            store(g.da, i, type, pack(a, type));
            store(g.db, i, type, pack(b, type));
        } else {
#pragma unroll
            for (int k = 0; k < V; ++k) out[k] = curve<kAct>(a[k]).value * b[k];
            drop(out, key, i);
            store(g.y, i, type, pack(out, type));
        }
    }
}

template <bool kBackward>
int64_t launch_gate(const Gate& g, int64_t act, void* stream) {
    const Operand operands[] = {{g.a, g.type}, {g.b, g.type},  {g.dy, g.type},
                                {g.y, g.type}, {g.da, g.type}, {g.db, g.type}};
    return with_vectors(g.count, operands, [&](auto V, auto Mix) {
        switch (act) {
            case kGeluNew: return launch_elements(gate_elements<V, Mix, kGeluNew, kBackward>, g.count, V, stream, g);
            case kGelu: return launch_elements(gate_elements<V, Mix, kGelu, kBackward>, g.count, V, stream, g);
            default: return launch_elements(gate_elements<V, Mix, kSilu, kBackward>, g.count, V, stream, g);
        }
    });
}

int64_t gated_act(const void* a, const void* b, const int64_t* seed, void* y, int64_t count, int64_t act,
                  double dropout_p, int64_t type, void* stream) {
    const Dropout dropout = make_dropout(seed, dropout_p);
    return launch_gate<false>({a, b, nullptr, y, nullptr, nullptr, count, dropout, dtype(type)}, act, stream);
}

int64_t gated_act_backward(const void* dy, const void* a, const void* b, const int64_t* seed, void* da, void* db,
                           int64_t count, int64_t act, double dropout_p, int64_t type, void* stream) {
    const Dropout dropout = make_dropout(seed, dropout_p);
    return launch_gate<true>({a, b, dy, nullptr, da, db, count, dropout, dtype(type)}, act, stream);
}

FP_KERNEL(gated_act);
FP_KERNEL(gated_act_backward);

}  // namespace

// SPDX-License-Identifier: Apache-2.0
// relu_dropout, forward and backward: fastprompt/ops/relu_dropout.py has the formulas. Memory-bound: one pass. A thread
// takes the eight elements whose bits share a byte, and whose random numbers a block.
#include "common/kernel.h"
#include "cuda/dropout.h"
#include "cuda/elements.h"
#include "cuda/vector.h"

namespace {

constexpr int kByte = 8;

struct Relu {
    const void* in;  // x, or dy
    void* out;       // y, or dx
    uint8_t* kept;   // [ceil(count / 8)], written forward and read backward
    int64_t count;
    Dropout dropout;
    float scale;  // of a kept element's gradient
    fp::DType type;
};

template <int V, int Mix>
__global__ void __launch_bounds__(kElementThreads) relu_elements(const Relu r) {
    const fp::DType type = type_of<Mix>(r.type);
    const DropoutKey key(r.dropout);
    const bool drops = r.dropout.seed != nullptr;
    for (int64_t first = first_element(kByte); first < r.count; first += element_stride(kByte)) {
        const fp::PhiloxBlock block = drops ? philox(key.seed, first / kByte) : fp::PhiloxBlock{};
        unsigned bits = 0;
#pragma unroll
        for (int part = 0; part < kByte; part += V) {
            const int64_t i = first + part;
            if (i >= r.count) continue;
            float value[V];
            unpack(load<V>(r.in, i, type), type, value);
#pragma unroll
            for (int k = 0; k < V; ++k) {
                const bool kept = !drops || key.keeps(block, part + k);
                const bool passes = kept && !(value[k] <= 0.0f);  // NaN passes, as in torch
                value[k] = passes ? key.scaled(value[k]) : 0.0f;
                bits |= static_cast<unsigned>(passes) << (part + k);
            }
            store(r.out, i, type, pack(value, type));
        }
        r.kept[first / kByte] = static_cast<uint8_t>(bits);
    }
}

template <int V, int Mix>
__global__ void __launch_bounds__(kElementThreads) relu_gradient(const Relu r) {
    const fp::DType type = type_of<Mix>(r.type);
    for (int64_t first = first_element(kByte); first < r.count; first += element_stride(kByte)) {
        const unsigned bits = r.kept[first / kByte];
#pragma unroll
        for (int part = 0; part < kByte; part += V) {
            const int64_t i = first + part;
            if (i >= r.count) continue;
            float value[V];
            unpack(load<V>(r.in, i, type), type, value);
#pragma unroll
            for (int k = 0; k < V; ++k) value[k] = (bits >> (part + k) & 1u) != 0 ? value[k] * r.scale : 0.0f;
            store(r.out, i, type, pack(value, type));
        }
    }
}

int64_t relu_dropout(const void* x, const int64_t* seed, void* y, uint8_t* kept, int64_t count, double dropout_p,
                     int64_t type, void* stream) {
    const Relu r{x, y, kept, count, make_dropout(seed, dropout_p), 0.0f, dtype(type)};
    const Operand operands[] = {{x, r.type}, {y, r.type}};
    return with_vectors(count, operands, [&](auto V, auto Mix) {
        return launch_elements(relu_elements<V, Mix>, count, kByte, stream, r);
    });
}

int64_t relu_dropout_backward(const void* dy, const uint8_t* kept, void* dx, int64_t count, double dropout_p,
                              int64_t type, void* stream) {
    const Relu r{dy,         dx, const_cast<uint8_t*>(kept), count, make_dropout(nullptr, 0.0), keep_scale(dropout_p),
                 dtype(type)};
    const Operand operands[] = {{dy, r.type}, {dx, r.type}};
    return with_vectors(count, operands, [&](auto V, auto Mix) {
        return launch_elements(relu_gradient<V, Mix>, count, kByte, stream, r);
    });
}

FP_KERNEL(relu_dropout);
FP_KERNEL(relu_dropout_backward);

}  // namespace

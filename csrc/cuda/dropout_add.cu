// SPDX-License-Identifier: Apache-2.0
// dropout_add: fastprompt/ops/dropout_add.py has the formula. Memory-bound: one pass, no mask in memory.
#include "common/kernel.h"
#include "cuda/dropout.h"
#include "cuda/elements.h"
#include "cuda/vector.h"

namespace {

struct Addition {
    const void *x, *residual;  // residual may be null
    void* h;
    int64_t count;
    Dropout dropout;
    fp::DType type;
};

template <int V, int Mix>
__global__ void __launch_bounds__(kElementThreads) add_elements(const Addition a) {
    const fp::DType type = type_of<Mix>(a.type);
    const DropoutKey key(a.dropout);
    for (int64_t i = first_element(V); i < a.count; i += element_stride(V)) {
        float value[V];
        unpack(load<V>(a.x, i, type), type, value);
        drop(value, key, i);
        if (a.residual != nullptr) {
            float stream[V];
            unpack(load<V>(a.residual, i, type), type, stream);
#pragma unroll
            for (int k = 0; k < V; ++k) value[k] += stream[k];
        }
        store(a.h, i, type, pack(value, type));
    }
}

int64_t dropout_add(const void* x, const void* residual, const int64_t* seed, void* h, int64_t count, double dropout_p,
                    int64_t type, void* stream) {
    const Addition a{x, residual, h, count, make_dropout(seed, dropout_p), dtype(type)};
    const Operand operands[] = {{x, a.type}, {residual, a.type}, {h, a.type}};
    return with_vectors(count, operands,
                        [&](auto V, auto Mix) { return launch_elements(add_elements<V, Mix>, count, V, stream, a); });
}

FP_KERNEL(dropout_add);

}  // namespace

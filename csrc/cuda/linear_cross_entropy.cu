// SPDX-License-Identifier: Apache-2.0
// A chunk of logits: fastprompt/ops/linear_cross_entropy.py has the formulas.
//
// Memory-bound: logits are read and written once. A team of threads (rows.h) holds its row in registers between the
// maximum and the sum. Of a row too long for that it holds the last part, and loads the others a second time. The rows
// of `others` are rescaled only where a chunk raised the maximum, which most do not.
#include <math.h>

#include "common/kernel.h"
#include "cuda/rows.h"
#include "cuda/vector.h"

namespace {

struct Chunk {
    void* logits;                 // [N, C]
    const int64_t* labels;        // [N]
    float *top, *total, *picked;  // [N]
    float* others;                // [N, D], or null where no gradient is wanted
    int64_t N, C, first, D;
    fp::DType type;
};

// The largest `value` of the team, in each of its threads. All of them must call.
__device__ __forceinline__ float team_max(float value) {
#pragma unroll
    for (int other = 16; other > 0; other /= 2) value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, other));
    if (blockDim.x == 32) return value;
    FP_SHARED(float, warp_max, kMaxTeam / 32);
    __syncthreads();  // all have read the maxima of the row before
    if (threadIdx.x % 32 == 0) warp_max[threadIdx.x / 32] = value;
    __syncthreads();
    for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) value = fmaxf(value, warp_max[warp]);
    return value;
}

template <int V, int Mix>
__global__ void __launch_bounds__(kMaxTeam) take_rows(const Chunk a) {
    const fp::DType type = type_of<Mix>(a.type);
    const Share<V> share(a.C);
    for (int64_t row = first_row(); row < a.N; row += row_step()) {
        const int64_t start = row * a.C;
        const int64_t label = a.labels[row] - a.first;
        const float before = a.top[row];
        float now = before;
        Vector<V> held[kHeld<V>];
        // The label's logit is taken out: -infinity adds nothing.
        const auto logits_at = [&](int j, int64_t i, float (&value)[V]) {
            unpack(held[j], type, value);
#pragma unroll
            for (int k = 0; k < V; ++k) value[k] = i * V + k == label ? -INFINITY : value[k];
        };
        for (int part = 0; part < share.parts; ++part) {
#pragma unroll
            for (int j = 0; j < kHeld<V>; ++j) {
                const int64_t i = share.at(part, j);
                if (i < share.count) held[j] = load<V>(a.logits, start + i * V, type);
            }
#pragma unroll
            for (int j = 0; j < kHeld<V>; ++j) {
                const int64_t i = share.at(part, j);
                if (i >= share.count) continue;
                float value[V];
                unpack(held[j], type, value);
#pragma unroll
                for (int k = 0; k < V; ++k) {
                    if (i * V + k == label) a.picked[row] = value[k];
                }
                logits_at(j, i, value);
#pragma unroll
                for (int k = 0; k < V; ++k) now = fmaxf(now, value[k]);  // passes over NaN: the sum has it
            }
        }
        now = team_max(now);
        const float base = now == -INFINITY ? 0.0f : now;  // nothing seen yet: -infinity less itself would be NaN
        const float factor = expf(before - base);
        float sum = 0.0f;
        for (int part = share.parts - 1; part >= 0; --part) {
#pragma unroll
            for (int j = 0; j < kHeld<V>; ++j) {
                const int64_t i = share.at(part, j);
                if (i >= share.count) continue;
                if (part < share.parts - 1) held[j] = load<V>(a.logits, start + i * V, type);
                float value[V];
                logits_at(j, i, value);
#pragma unroll
                for (int k = 0; k < V; ++k) {
                    value[k] = expf(value[k] - base);
                    sum += value[k];
                }
                if (a.others != nullptr) store(a.logits, start + i * V, type, pack(value, type));
            }
        }
        sum = team_sum(sum);
        __syncwarp();  // every lane has read top: now it may be written
        if (threadIdx.x == 0) {
            a.top[row] = now;
            a.total[row] = a.total[row] * factor + sum;
        }
        if (a.others == nullptr || factor == 1.0f) continue;
        for (int64_t d = threadIdx.x; d < a.D; d += blockDim.x) a.others[row * a.D + d] *= factor;
    }
}

int64_t linear_cross_entropy(void* logits, const int64_t* labels, float* top, float* total, float* picked,
                             float* others, int64_t N, int64_t C, int64_t first, int64_t D, int64_t type,
                             void* stream) {
    const Chunk chunk = {logits, labels, top, total, picked, others, N, C, first, D, dtype(type)};
    const Operand operands[] = {{logits, chunk.type}};
    return with_vectors(C, operands,
                        [&](auto V, auto Mix) { return launch_rows<V>(take_rows<V, Mix>, N, C, stream, chunk); });
}

FP_KERNEL(linear_cross_entropy);

}  // namespace

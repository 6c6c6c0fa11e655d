// SPDX-License-Identifier: Apache-2.0
// The gradient of the prompts' keys or values from each example's share of it.
#include "common/kernel.h"
#include "cuda/vector.h"

namespace {

struct PromptSum {
    const float* share;         // [B, E]
    const int64_t* prompt_ids;  // [B]; null: all read prompt 0
    void* total;                // [R, E]
    int64_t B, R, E;
    fp::DType type;  // of total
};

constexpr int kInFlight = 8;  // examples whose shares a thread has in flight
constexpr int kThreads = 128;

// total[r] = the sum of share[b] over the examples b that read prompt r, in ascending order. A thread owns V
// neighbours.
template <int V>
__global__ void __launch_bounds__(kThreads) prompt_sum(const PromptSum a) {
    const int64_t vectors = a.E / V, threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < a.R * vectors; i += threads) {
        const int64_t r = i / vectors, column = i % vectors * V;
        float total[V] = {};
        for (int64_t first = 0; first < a.B; first += kInFlight) {
            bool reads[kInFlight];
            Vector<V> vector[kInFlight];
#pragma unroll
            for (int u = 0; u < kInFlight; ++u) {
                const int64_t b = first + u;
                reads[u] = b < a.B && (a.prompt_ids == nullptr ? 0 : a.prompt_ids[b]) == r;
            }
#pragma unroll
            for (int u = 0; u < kInFlight; ++u) {
                if (reads[u]) vector[u] = load<V>(a.share, (first + u) * a.E + column, fp::kFloat32);
            }
#pragma unroll
            for (int u = 0; u < kInFlight; ++u) {
                if (!reads[u]) continue;
                float value[V];
                unpack(vector[u], fp::kFloat32, value);
#pragma unroll
                for (int k = 0; k < V; ++k) total[k] += value[k];
            }
        }
        store(a.total, i * V, a.type, pack(total, a.type));
    }
}

int64_t t5_attention_prompt_sum(const float* share, const int64_t* prompt_ids, void* total, int64_t B, int64_t R,
                                int64_t row_elements, int64_t dtype, void* stream) {
    if (R * row_elements == 0) return 0;
    const PromptSum a = {share, prompt_ids, total, B, R, row_elements, static_cast<fp::DType>(dtype)};
    const bool vectors = row_elements % 4 == 0 && reinterpret_cast<uintptr_t>(share) % 16 == 0 &&
                         reinterpret_cast<uintptr_t>(total) % (4 * size_of(a.type)) == 0;
    const int64_t threads = R * row_elements / (vectors ? 4 : 1);
    const dim3 grid(limit_blocks((threads + kThreads - 1) / kThreads));
    return launch(vectors ? prompt_sum<4> : prompt_sum<1>, grid, dim3(kThreads), stream, a);
}

FP_KERNEL(t5_attention_prompt_sum);

}  // namespace

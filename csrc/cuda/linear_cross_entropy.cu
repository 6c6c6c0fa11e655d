// SPDX-License-Identifier: Apache-2.0
// A chunk of logits, the rows' losses and gradients, their mean: fastprompt/ops/linear_cross_entropy.py has the
// formulas.
//
// Chunks are memory-bound: logits are read and written once. A team of threads (rows.h) holds its row in registers
// between the maximum and the sum. Of a row too long for that it holds the last part, and loads the others a second
// time. The rows of `others` are rescaled only where a chunk raised the maximum, which most do not.
#include <math.h>

#include "common/kernel.h"
#include "common/linear_cross_entropy.h"
#include "cuda/rows.h"
#include "cuda/vector.h"

namespace {

struct Chunk {
    void* logits;                 // [N, C]
    const int64_t* labels;        // [N]
    float *top, *total, *picked;  // [N]
    float* others;                // [N, D], what earlier chunks gave, or null
    int64_t N, C, first, D;
    bool needs_grad;
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
        const bool initial = a.first == 0;  // the statistics hold nothing yet: they are written, not read
        const float before = initial ? -INFINITY : a.top[row];
        float now = before;
        if (initial && threadIdx.x == 0 && (label < 0 || label >= a.C)) a.picked[row] = NAN;
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
                if (a.needs_grad) store(a.logits, start + i * V, type, pack(value, type));
            }
        }
        sum = team_sum(sum);
        __syncwarp();  // every lane has read top: now it may be written
        if (threadIdx.x == 0) {
            a.top[row] = now;
            a.total[row] = initial ? sum : a.total[row] * factor + sum;
        }
        if (a.others == nullptr || factor == 1.0f) continue;
        for (int64_t d = threadIdx.x; d < a.D; d += blockDim.x) a.others[row * a.D + d] *= factor;
    }
}

int64_t linear_cross_entropy(void* logits, const int64_t* labels, float* top, float* total, float* picked,
                             float* others, int64_t N, int64_t C, int64_t first, int64_t D, int64_t needs_grad,
                             int64_t type, void* stream) {
    const Chunk chunk = {logits, labels, top, total, picked, others, N, C, first, D, needs_grad != 0, dtype(type)};
    const Operand operands[] = {{logits, chunk.type}};
    return with_vectors(C, operands,
                        [&](auto V, auto Mix) { return launch_rows<V>(take_rows<V, Mix>, N, C, stream, chunk); });
}

struct Rows {
    const int64_t* labels;              // [N]
    const float *top, *total, *picked;  // [N]
    const float* others;                // [N, D], or null where no gradient is wanted
    const void* weight;                 // row n's label is at label_stride * label + row_stride * n
    float* losses;                      // [N]
    void* drows;                        // [N, D], or null
    int64_t N, D, V, label_stride, row_stride, ignore_index;
    fp::DType type;
};

template <int V, int Mix>
__global__ void __launch_bounds__(kMaxTeam) finish_rows(const Rows a) {
    const fp::DType type = type_of<Mix>(a.type);
    for (int64_t row = first_row(); row < a.N; row += row_step()) {
        const int64_t label = a.labels[row];
        const bool counts = label != a.ignore_index;
        const fp::RowLoss found = row_loss(a.top[row], a.total[row], a.picked[row]);
        if (threadIdx.x == 0) a.losses[row] = counts ? found.loss : 0.0f;
        if (a.drows == nullptr) continue;
        const int64_t at = known_class(label, a.V) * a.label_stride + row * a.row_stride;
        for (int64_t i = threadIdx.x; i < a.D / V; i += blockDim.x) {
            float value[V];
            unpack(load<V>(a.weight, at + i * V, type), type, value);
#pragma unroll
            for (int k = 0; k < V; ++k) {
                const float drow = (a.others[row * a.D + i * V + k] / found.share - value[k]) * found.odds;
                value[k] = counts ? drow : 0.0f;
            }
            store(a.drows, row * a.D + i * V, type, pack(value, type));
        }
    }
}

int64_t linear_cross_entropy_rows(const int64_t* labels, const float* top, const float* total, const float* picked,
                                  const float* others, const void* weight, float* losses, void* drows, int64_t N,
                                  int64_t D, int64_t V, int64_t label_stride, int64_t row_stride, int64_t ignore_index,
                                  int64_t type, void* stream) {
    const Rows rows = {labels, top, total, picked,       others,     weight,       losses,     drows,
                       N,      D,   V,     label_stride, row_stride, ignore_index, dtype(type)};
    const Operand operands[] = {{weight, rows.type}, {drows, rows.type}};
    return with_vectors(D | label_stride, operands, [&](auto Width, auto Mix) {
        return launch_rows<Width>(finish_rows<Width, Mix>, N, drows == nullptr || D == 0 ? 1 : D, stream, rows);
    });
}

struct Mean {
    const float* losses;    // [N]
    const int64_t* labels;  // [N]
    const float* divisor;   // [1], or null: the number of labels that count
    void* loss;             // [1]
    float* share;           // [1]
    int64_t N, ignore_index;
    float scale;
    fp::DType type;
};

// By one team, so that the sum has one order.
__global__ void __launch_bounds__(kMaxTeam) mean_of_rows(const Mean a) {
    float sum = 0.0f, count = 0.0f;
#pragma unroll 4
    for (int64_t row = threadIdx.x; row < a.N; row += blockDim.x) {
        sum += a.losses[row];
        count += a.labels[row] != a.ignore_index ? 1.0f : 0.0f;
    }
    sum = team_sum(sum);
    count = team_sum(count);
    if (threadIdx.x != 0) return;
    const float divisor = a.divisor == nullptr ? count : *a.divisor;
    const float loss[] = {count > 0.0f ? sum / divisor : 0.0f};
    store(a.loss, 0, a.type, pack(loss, a.type));
    *a.share = count > 0.0f ? a.scale / divisor : 0.0f;
}

int64_t linear_cross_entropy_mean(const float* losses, const int64_t* labels, const float* divisor, void* loss,
                                  float* share, int64_t N, int64_t ignore_index, double scale, int64_t type,
                                  void* stream) {
    const Mean mean = {losses, labels, divisor, loss, share, N, ignore_index, static_cast<float>(scale), dtype(type)};
    return launch(mean_of_rows, dim3(1), dim3(N > 32 ? kMaxTeam : 32), stream, mean);
}

FP_KERNEL(linear_cross_entropy);
FP_KERNEL(linear_cross_entropy_rows);
FP_KERNEL(linear_cross_entropy_mean);

}  // namespace

// SPDX-License-Identifier: Apache-2.0
// prompt_embed, forward and backward: fastprompt/ops/prompt_embed.py describes the tensors.
//
// Memory-bound copies. Forward: a team of threads (rows.h) finds where its output row comes from and copies it.
// Backward: a thread owns V neighbours of one prompt row and adds up their gradients over the batch, in order.
//
// starts, lens, cu_tokens and cu_rows are data that nobody has checked: no value of theirs leads out of a tensor.
#include "common/integers.h"
#include "common/kernel.h"
#include "cuda/dropout.h"
#include "cuda/rows.h"
#include "cuda/vector.h"

namespace {

struct Forward {
    const void *ids, *weight, *prompts;                  // [B, S] or [S], [vocabulary, D], [R, D]
    const int64_t *starts, *lens, *cu_tokens, *cu_rows;  // [B], [B], [B + 1], [B + 1], or null
    void* out;                                           // [B, L, D] or [N, D]
    int64_t* error;                                      // [1] or null: receives 1 + the flat index of a bad id
    int64_t B, S, rows, R, vocabulary, D;                // rows: L or N
    Dropout dropout;
    bool ids_are_int64;  // int64, else int32
    fp::DType prompt_type, type;
};

// Where an output row comes from.
struct Source {
    int64_t row;  // of the prompts or of the weight; -1: the output row is zero
    bool prompt;
};

// The last b in [0, B) with cu_rows[b] <= row: empty sequences before it do not hide it. -1 if there is none.
__device__ __forceinline__ int64_t find_sequence(const int64_t* cu_rows, int64_t B, int64_t row) {
    int64_t low = -1, high = B;
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        (cu_rows[middle] <= row ? low : high) = middle;
    }
    return low;
}

__device__ __forceinline__ Source find_source(const Forward& a, int64_t row) {
    const bool packed = a.cu_rows != nullptr;
    const int64_t b = packed ? find_sequence(a.cu_rows, a.B, row) : row / a.rows;
    if (b < 0) return {-1, false};
    const int64_t l = row - (packed ? clamp(a.cu_rows[b], 0, row) : b * a.rows);
    const int64_t start = a.starts == nullptr ? 0 : clamp(a.starts[b], 0, a.R);
    const int64_t length = a.lens == nullptr ? a.R : clamp(a.lens[b], 0, a.R - start);
    if (l < length) return {start + l, true};
    const int64_t begin = packed ? clamp(a.cu_tokens[b], 0, a.S) : b * a.S;
    const int64_t end = packed ? clamp(a.cu_tokens[b + 1], 0, a.S) : begin + a.S;
    const int64_t token = begin + l - length;
    if (token >= end) return {-1, false};
    const int64_t id =
        a.ids_are_int64 ? static_cast<const int64_t*>(a.ids)[token] : static_cast<const int32_t*>(a.ids)[token];
    if (id >= 0 && id < a.vocabulary) return {id, false};
    if (a.error != nullptr && threadIdx.x == 0) *a.error = 1 + token;
    return {-1, false};
}

// V elements of an fp32 table, rounded. Eight bytes at a time: more alignment than that is not promised.
template <int V>
__device__ __forceinline__ Vector<V> load_rounded(const void* table, int64_t index, fp::DType type) {
    const float* address = static_cast<const float*>(table) + index;
    float value[V] = {*address};
#pragma unroll
    for (int k = 0; k < V - 1; k += 2) {
        const float2 pair = *reinterpret_cast<const float2*>(address + k);
        value[k] = pair.x, value[k + 1] = pair.y;
    }
    return pack(value, type);
}

template <int V>
__global__ void __launch_bounds__(kMaxTeam) embed_rows(const Forward a) {
    const Share<V> share(a.D);
    const DropoutKey key(a.dropout);
    const int64_t N = a.cu_rows == nullptr ? a.B * a.rows : a.rows;
    for (int64_t row = first_row(); row < N; row += row_step()) {
        const Source source = find_source(a, row);
        const void* table = source.prompt ? a.prompts : a.weight;
        const bool rounded = source.prompt && a.prompt_type != a.type;
        for (int part = 0; part < share.parts; ++part) {
            Vector<V> vector[kHeld<V>];
#pragma unroll
            for (int j = 0; j < kHeld<V>; ++j) {
                const int64_t i = share.at(part, j), from = source.row * a.D + i * V;
                vector[j] = {};
                if (i >= share.count || source.row < 0) continue;
                vector[j] = rounded ? load_rounded<V>(table, from, a.type) : load<V>(table, from, a.type);
            }
#pragma unroll
            for (int j = 0; j < kHeld<V>; ++j) {
                const int64_t i = share.at(part, j), to = row * a.D + i * V;
                if (i >= share.count) continue;
                if (a.dropout.seed != nullptr) {
                    float value[V];
                    unpack(vector[j], a.type, value);
                    drop(value, key, to);
                    vector[j] = pack(value, a.type);
                }
                store(a.out, to, a.type, vector[j]);
            }
        }
    }
}

struct Backward {
    const void* dout;                        // [B, L, D] or [N, D]
    const int64_t *starts, *lens, *cu_rows;  // [B], [B], [B + 1], or null
    void* dprompts;                          // [R, D]
    int64_t B, rows, R, D;                   // rows: L or N
    Dropout dropout;
    fp::DType type, prompt_type;
};

constexpr int kInFlight = 16;         // examples whose rows a thread has in flight
constexpr int kBackwardThreads = 64;  // small blocks: a prompt is small, and all multiprocessors should have a share

// The row of dout that prompt row r was copied to in example b; -1 if it was not.
__device__ __forceinline__ int64_t find_copy(const Backward& a, int64_t b, int64_t r) {
    if (b >= a.B) return -1;
    const int64_t start = a.starts == nullptr ? 0 : a.starts[b], length = a.lens == nullptr ? a.R : a.lens[b];
    if (start < 0 || start > r || r - start >= length) return -1;
    const int64_t begin = a.cu_rows == nullptr ? 0 : a.cu_rows[b], l = r - start;
    if (begin < 0 || begin >= a.rows - l) return -1;
    return a.cu_rows == nullptr ? b * a.rows + l : begin + l;
}

template <int V>
__global__ void __launch_bounds__(kBackwardThreads) embed_rows_backward(const Backward a) {
    const int64_t vectors = a.D / V, threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
    const DropoutKey key(a.dropout);
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < a.R * vectors; i += threads) {
        const int64_t r = i / vectors, column = i % vectors * V;
        float total[V] = {}, lost[V] = {};  // lost: the low-order part of what Kahan's sum has so far
        for (int64_t b = 0; b < a.B; b += kInFlight) {
            int64_t row[kInFlight];
            Vector<V> vector[kInFlight];
#pragma unroll
            for (int u = 0; u < kInFlight; ++u) row[u] = find_copy(a, b + u, r);
#pragma unroll
            for (int u = 0; u < kInFlight; ++u) {
                if (row[u] >= 0) vector[u] = load<V>(a.dout, row[u] * a.D + column, a.type);
            }
#pragma unroll
            for (int u = 0; u < kInFlight; ++u) {
                if (row[u] < 0) continue;
                float value[V];
                unpack(vector[u], a.type, value);
                drop(value, key, row[u] * a.D + column);
#pragma unroll
                for (int k = 0; k < V; ++k) {
                    const float addend = __fsub_rn(value[k], lost[k]), grown = __fadd_rn(total[k], addend);
                    lost[k] = __fsub_rn(__fsub_rn(grown, total[k]), addend);
                    total[k] = grown;
                }
            }
        }
        store(a.dprompts, i * V, a.prompt_type, pack(total, a.prompt_type));
    }
}

int64_t prompt_embed(const void* ids, const void* weight, const void* prompts, const int64_t* starts,
                     const int64_t* lens, const int64_t* cu_tokens, const int64_t* cu_rows, const int64_t* seed,
                     void* out, int64_t* error, int64_t B, int64_t S, int64_t rows, int64_t R, int64_t vocabulary,
                     int64_t D, double dropout_p, int64_t ids_are_int64, int64_t prompt_dtype, int64_t weight_dtype,
                     void* stream) {
    const fp::DType type = dtype(weight_dtype);
    Forward a = {ids, weight, prompts, starts, lens, cu_tokens, cu_rows, out, error, B, S, rows, R, vocabulary, D};
    a.dropout = make_dropout(seed, dropout_p);
    a.ids_are_int64 = ids_are_int64 != 0;
    a.prompt_type = dtype(prompt_dtype), a.type = type;
    const Operand operands[] = {{out, type}, {weight, type}, {prompts, type}};
    return with_vectors(D, operands, [&](auto V, auto) {
        return launch_rows<V>(embed_rows<V>, cu_rows == nullptr ? B * rows : rows, D, stream, a);
    });
}

int64_t prompt_embed_backward(const void* dout, const int64_t* starts, const int64_t* lens, const int64_t* cu_rows,
                              const int64_t* seed, void* dprompts, int64_t B, int64_t rows, int64_t R, int64_t D,
                              double dropout_p, int64_t dout_dtype, int64_t prompt_dtype, void* stream) {
    const fp::DType type = dtype(dout_dtype), prompt_type = dtype(prompt_dtype);
    const Dropout dropout = make_dropout(seed, dropout_p);
    const Backward a = {dout, starts, lens, cu_rows, dprompts, B, rows, R, D, dropout, type, prompt_type};
    const Operand operands[] = {{dout, type}, {dprompts, prompt_type}};
    return with_vectors(D, operands, [&](auto V, auto) {
        const int64_t blocks = (R * (D / V) + kBackwardThreads - 1) / kBackwardThreads;
        return launch(embed_rows_backward<V>, dim3(limit_blocks(blocks)), dim3(kBackwardThreads), stream, a);
    });
}

FP_KERNEL(prompt_embed);
FP_KERNEL(prompt_embed_backward);

}  // namespace

// SPDX-License-Identifier: Apache-2.0
// t5_attention for few queries, as while decoding, and the sum of the prompts' gradients. Shapes and formulas:
// fastprompt/ops/t5_attention.py. Longer calls and the backward pass are Triton's.
//
// A block takes one query and head. Its warps take every kWarps-th key each, a lane every 32nd column, so that a warp
// reads whole rows; softmax is online per warp, and the warps' shares are joined in one order: the same bits each run.
#include <math.h>

#include "common/attention.h"
#include "common/kernel.h"
#include "cuda/dropout.h"
#include "cuda/launch.h"

namespace {

constexpr int kWarps = 4;

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
    for (int other = 16; other > 0; other /= 2) value += __shfl_xor_sync(0xffffffffu, value, other);
    return value;
}

// One query of one example and head.
struct Query {
    int64_t b, i, h, position, prompt, prompt_keys, keys;  // keys: the prompt's and the example's own
    bool valid;                                            // false: the example names a prompt that does not exist

    __device__ Query(const fp::Attention& a, int64_t row) : b(0), h(row % a.H) {
        const int64_t n = row / a.H;
        if (a.packed != 0) {
            int64_t high = a.B;
            while (high - b > 1) {
                const int64_t middle = (b + high) / 2;
                if (a.cu_q[middle] <= n) {
                    b = middle;
                } else {
                    high = middle;
                }
            }
        } else {
            b = n / a.T;
        }
        i = n - a.query_begin(b);
        position = a.query_offset(b) + i;
        prompt = a.prompt(b);
        valid = a.prompt_k == nullptr || (prompt >= 0 && prompt < a.R);
        const int64_t length = valid ? a.prompt_keys(b) : 0;
        prompt_keys = length < 0 ? 0 : length > a.P ? a.P : length;
        keys = prompt_keys + a.keys(b);
    }

    // The first key after the last that may be allowed.
    __device__ int64_t end(const fp::Attention& a) const {
        const int64_t last = prompt_keys + position + 1;
        return a.causal != 0 && last < keys ? last : keys;
    }

    __device__ bool allowed(const fp::Attention& a, int64_t j) const {
        return j < prompt_keys || a.key_mask == nullptr || a.key_mask[b * a.S + j - prompt_keys] != 0;
    }

    __device__ int64_t offset(const fp::Attention& a, int64_t j, bool values) const {
        if (j < prompt_keys) {
            const fp::Strides& s = values ? a.prompt_v_strides : a.prompt_k_strides;
            return prompt * s.example + j * s.row + h * s.head;
        }
        return a.own(values ? a.v_strides : a.k_strides, b, a.key_begin(b), j - prompt_keys, h);
    }

    __device__ float bias(const fp::Attention& a, int64_t j) const {
        if (a.bias == nullptr) return 0.0f;
        const int64_t distance = j - prompt_keys - position;
        const int64_t near = distance < -a.M ? -a.M : distance > a.M ? a.M : distance;
        return a.bias[h * (2 * a.M + 1) + a.M + near];
    }

    // Dropout's factor for key j.
    __device__ float factor(const fp::Attention& a, const DropoutKey& key, int64_t j) const {
        if (key.dropout.seed == nullptr) return 1.0f;
        const uint64_t counter = static_cast<uint64_t>(i) << 32 | static_cast<uint64_t>(j / 4);
        const uint32_t word = word_at(philox(key.seed, counter, static_cast<uint32_t>(b * a.H + h)), j % 4);
        return word >= key.dropout.threshold ? key.dropout.scale : 0.0f;
    }
};

// A lane's columns of a row: lane, lane + 32, ... Zero past the row's end.
template <class T, int C>
__device__ __forceinline__ void load_columns(const T* row, int64_t K, float (&to)[C]) {
#pragma unroll
    for (int c = 0; c < C; ++c) {
        const int64_t d = threadIdx.x % 32 + 32 * c;
        to[c] = d < K ? to_float(row[d]) : 0.0f;
    }
}

// What a warp has seen so far: the largest score, the sum of exponentials, the weighted sum of values.
template <int C>
struct Seen {
    float top = -INFINITY, total = 0.0f;
    int count = 0;
    float sum[C] = {};

    __device__ void add(float score, float factor, const float (&value)[C]) {
        const float high = score > top || score != score ? score : top;
        const float base = high == -INFINITY ? 0.0f : high;  // all scores so far are -inf: weights of 0, not NaN
        const float rescale = expf(top - base), weight = expf(score - base);
        top = high;
        total = total * rescale + weight;
        ++count;
#pragma unroll
        for (int c = 0; c < C; ++c) {
            sum[c] = sum[c] * rescale + (factor != 0.0f ? weight * factor * value[c] : 0.0f);
        }
    }
};

template <class T, int C>
__global__ void attend(fp::Attention a, Dropout dropout, T* out, float* stats) {
    FP_SHARED(float, sums, kWarps * 32 * C);
    FP_SHARED(float, tops, kWarps);
    FP_SHARED(float, totals, kWarps);
    FP_SHARED(int, counts, kWarps);
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const DropoutKey key(dropout);
    for (int64_t row = blockIdx.x; row < a.N * a.H; row += gridDim.x) {
        const Query query(a, row);
        float q[C], k[C], v[C];
        const int64_t at = a.own(a.q_strides, query.b, a.query_begin(query.b), query.i, query.h);
        load_columns(static_cast<const T*>(a.q) + at, a.K, q);
        Seen<C> seen;
        const int64_t end = query.valid ? query.end(a) : 0;
        for (int64_t j = warp; j < end; j += kWarps) {
            if (!query.allowed(a, j)) continue;
            const bool own = j >= query.prompt_keys;
            load_columns(static_cast<const T*>(own ? a.k : a.prompt_k) + query.offset(a, j, false), a.K, k);
            load_columns(static_cast<const T*>(own ? a.v : a.prompt_v) + query.offset(a, j, true), a.K, v);
            float product = 0.0f;
#pragma unroll
            for (int c = 0; c < C; ++c) product += q[c] * k[c];
            seen.add(warp_sum(product) + query.bias(a, j), query.factor(a, key, j), v);
        }
        if (lane == 0) {
            tops[warp] = seen.top;
            totals[warp] = seen.total;
            counts[warp] = seen.count;
        }
        __syncthreads();
        float top = -INFINITY, total = 0.0f;
        int count = 0;
        for (int w = 0; w < kWarps; ++w) {
            if (counts[w] > 0 && (tops[w] > top || tops[w] != tops[w])) top = tops[w];
            count += counts[w];
        }
        const float base = top == -INFINITY ? 0.0f : top;
        for (int w = 0; w < kWarps; ++w) total += counts[w] > 0 ? totals[w] * expf(tops[w] - base) : 0.0f;
        float scale = seen.count > 0 ? expf(seen.top - base) : 0.0f;
        if (count == 0) {  // a row that may attend to nothing takes the mean of the example's own values
            for (int64_t j = warp; query.valid && j < query.keys; j += kWarps) {
                load_columns(static_cast<const T*>(a.v) + query.offset(a, j, true), a.K, v);
                const float factor = query.factor(a, key, j);
#pragma unroll
                for (int c = 0; c < C; ++c) seen.sum[c] += factor != 0.0f ? factor * v[c] : 0.0f;
            }
            scale = 1.0f;
        }
#pragma unroll
        for (int c = 0; c < C; ++c) sums[warp * 32 * C + 32 * c + lane] = seen.sum[c] * scale;
        __syncthreads();
        const float keys = query.keys > 0 ? static_cast<float>(query.keys) : 1.0f;
        for (int64_t d = threadIdx.x; d < a.K; d += 32 * kWarps) {
            float sum = 0.0f;
            for (int w = 0; w < kWarps; ++w) sum += sums[w * 32 * C + d];
            const float value = !query.valid ? NAN : sum / (count > 0 ? total : keys);
            out[row * a.K + d] = from_float<T>(value);
        }
        if (threadIdx.x == 0) {
            const int64_t n = query.h * a.N + row / a.H;
            stats[n] = !query.valid ? NAN : count > 0 ? top : 0.0f;
            stats[a.H * a.N + n] = !query.valid ? NAN : count > 0 ? total : 0.0f;
        }
        __syncthreads();  // before the next row overwrites what is shared
    }
}

template <class T>
int64_t launch_attend(const fp::Attention& a, const Dropout& dropout, void* out, float* stats, void* stream) {
    const dim3 grid(limit_blocks(a.N * a.H)), block(32 * kWarps);
    auto* to = static_cast<T*>(out);
    if (a.K <= 32) return launch(attend<T, 1>, grid, block, 0, stream, a, dropout, to, stats);
    if (a.K == 64) return launch(attend<T, 2>, grid, block, 0, stream, a, dropout, to, stats);
    if (a.K == 128) return launch(attend<T, 4>, grid, block, 0, stream, a, dropout, to, stats);
    return launch(attend<T, 8>, grid, block, 0, stream, a, dropout, to, stats);
}

int64_t t5_attention(const void* q, const void* k, const void* v, const float* bias, const void* prompt_k,
                     const void* prompt_v, const int64_t* prompt_ids, const int64_t* prompt_lens,
                     const uint8_t* key_mask, const int64_t* offsets, const int64_t* cu_q, const int64_t* cu_k,
                     const int64_t* sizes, const int64_t* seed, void* out, float* stats, int64_t offset, int64_t causal,
                     double dropout_p, int64_t dtype, void* stream) {
    const fp::Attention a = attention(q, k, v, bias, prompt_k, prompt_v, prompt_ids, prompt_lens, key_mask, offsets,
                                      cu_q, cu_k, sizes, offset, causal);
    if (a.N * a.H == 0) return 0;
    const Dropout dropout = make_dropout(seed, dropout_p);
    if (dtype == fp::kBFloat16) return launch_attend<fp::bf16>(a, dropout, out, stats, stream);
    if (dtype == fp::kFloat16) return launch_attend<fp::fp16>(a, dropout, out, stats, stream);
    return launch_attend<float>(a, dropout, out, stats, stream);
}

// total[r][e] = the sum over b, ascending, of share[b][e] where example b reads prompt r. A thread per element.
template <class T>
__global__ void prompt_sum(const float* share, const int64_t* prompt_ids, T* total, int64_t B, int64_t R, int64_t E) {
    const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
    for (int64_t n = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; n < R * E; n += step) {
        const int64_t r = n / E, e = n % E;
        float sum = 0.0f;
        for (int64_t b = 0; b < B; ++b) {
            if ((prompt_ids == nullptr ? 0 : prompt_ids[b]) == r) sum += share[b * E + e];
        }
        total[n] = from_float<T>(sum);
    }
}

int64_t t5_attention_prompt_sum(const float* share, const int64_t* prompt_ids, void* total, int64_t B, int64_t R,
                                int64_t row_elements, int64_t dtype, void* stream) {
    if (R * row_elements == 0) return 0;
    const dim3 grid(limit_blocks((R * row_elements + 255) / 256)), block(256);
    const auto run = [&](auto* to) {
        using T = std::remove_pointer_t<decltype(to)>;
        return launch(prompt_sum<T>, grid, block, 0, stream, share, prompt_ids, to, B, R, row_elements);
    };
    if (dtype == fp::kBFloat16) return run(static_cast<fp::bf16*>(total));
    if (dtype == fp::kFloat16) return run(static_cast<fp::fp16*>(total));
    return run(static_cast<float*>(total));
}

FP_KERNEL(t5_attention);
FP_KERNEL(t5_attention_prompt_sum);

}  // namespace

// SPDX-License-Identifier: Apache-2.0
// t5_attention for few queries, as while decoding. Shapes and formulas: fastprompt/ops/t5_attention.py. Longer and
// packed calls and the backward pass are Triton's.
//
// Bandwidth-bound: with few queries each key and value is used a few times only. A block takes one head of one example
// and up to Q of its neighbouring queries, which share the loads. A team of K / C neighbouring lanes takes a key, C
// columns to a lane in loads of 16 bytes; the block's teams deal the keys out among them, and each team has several
// keys' loads in flight. Softmax is online per team; what the teams have seen is joined in one order, first within a
// warp, then across them: the same bits in every run.
//
// B * H blocks (times T / 4, rounded up) are all there are: fewer than the GPU has multiprocessors leave some idle,
// however many keys there are. To split one block's keys over several takes room for their partial sums, which the op
// does not hand in.
//
// offsets, prompt_ids and prompt_lens are data that nobody has checked: no value of theirs leads out of a tensor.
#include <math.h>

#include "common/attention.h"
#include "common/integers.h"
#include "common/kernel.h"
#include "cuda/dropout.h"
#include "cuda/vector.h"

namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int kQueries = 4;  // that share a block, if there are several

// Blocks on a multiprocessor at least. Left to itself, the compiler aims for one more and then lacks registers.
template <int Q>
constexpr int kBlocks = Q == 1 ? 3 : 2;

template <class T>
constexpr fp::DType kType = std::is_same_v<T, float>      ? fp::kFloat32
                            : std::is_same_v<T, fp::bf16> ? fp::kBFloat16
                                                          : fp::kFloat16;

struct Decode {
    fp::Attention a;
    Dropout dropout;
    void* out;      // [N, H, K]
    float* stats;   // [2, H, N]
    bool aligned;   // every row of every tensor begins at a multiple of 16 bytes
    int64_t items;  // groups of queries, of all examples and heads
};

// Up to Q neighbouring queries of example b and head h, the first of which is the example's query i.
struct Group {
    int64_t b, h, i;
    int64_t position;  // of query i
    int64_t prompt, prompt_keys, own_keys;
    unsigned queries;  // a bit for each that there is
    bool valid;        // false: the example names a prompt that does not exist

    // Items of one example and head are neighbours: they read the same keys.
    __device__ __forceinline__ Group(const fp::Attention& a, int64_t item, int Q) {
        const int64_t groups = (a.T + Q - 1) / Q;
        h = item / groups % a.H, b = item / groups / a.H;
        i = item % groups * Q;
        const int64_t left = a.T - i;
        queries = (1u << (left < Q ? left : Q)) - 1;
        position = clamp(a.query_offset(b), -(int64_t{1} << 40), int64_t{1} << 40) + i;
        prompt = a.prompt(b);
        valid = a.prompt_k == nullptr || (prompt >= 0 && prompt < a.R);
        prompt_keys = valid ? clamp(a.prompt_keys(b), 0, a.P) : 0;
        own_keys = valid ? a.S : 0;
    }

    // Query i's, of all N. Not a member: it would take registers all the while.
    __device__ __forceinline__ int64_t row(const fp::Attention& a) const { return b * a.T + i; }
};

// Keys and values that lie one stride apart, the prompt's or the example's own.
template <class T>
struct Source {
    const T *k, *v;        // the first row's, at the lane's columns
    int64_t k_row, v_row;  // elements from one row to the next
    int64_t count;         // rows
    int64_t first;         // the first row's number among all keys, for dropout
    int64_t distance;      // the first row's position less that of the group's first query
    const uint8_t* mask;   // [count]; null: all
    bool causal;
};

template <class T>
__device__ __forceinline__ Source<T> prompt_source(const fp::Attention& a, const Group& g, int64_t column) {
    const fp::Strides &k = a.prompt_k_strides, &v = a.prompt_v_strides;
    const int64_t prompt = g.valid ? g.prompt : 0;
    return {static_cast<const T*>(a.prompt_k) + prompt * k.example + g.h * k.head + column,
            static_cast<const T*>(a.prompt_v) + prompt * v.example + g.h * v.head + column,
            k.row,
            v.row,
            g.prompt_keys,
            0,
            -g.prompt_keys - g.position,
            nullptr,
            false};
}

// All the example's keys if `starved`, else those that some query of the group may attend to.
template <class T, int Q>
__device__ __forceinline__ Source<T> own_source(const fp::Attention& a, const Group& g, int64_t column, bool starved) {
    const fp::Strides &k = a.k_strides, &v = a.v_strides;
    const int64_t last = g.position + Q;
    const bool causal = a.causal != 0 && !starved;
    return {static_cast<const T*>(a.k) + g.b * k.example + g.h * k.head + column,
            static_cast<const T*>(a.v) + g.b * v.example + g.h * v.head + column,
            k.row,
            v.row,
            causal && last < g.own_keys ? last : g.own_keys,
            g.prompt_keys,
            -g.position,
            a.key_mask == nullptr || starved ? nullptr : a.key_mask + g.b * a.S,
            causal};
}

// C neighbouring elements of a row, as they lie in memory.
template <class T, int C>
struct Columns {
    static constexpr int kVector = 16 / sizeof(T), kParts = C / kVector;
    Vector<kVector> part[kParts];

    __device__ __forceinline__ void load_vectors(const T* from) {
#pragma unroll
        for (int p = 0; p < kParts; ++p) part[p] = load<kVector>(from, p * kVector, kType<T>);
    }

    __device__ __forceinline__ void load_elements(const T* from) {
        constexpr int kPerWord = 4 / sizeof(T);
#pragma unroll
        for (int c = 0; c < C; ++c) {
            const uint32_t bits = load<1>(from, c, kType<T>).word[0];
            uint32_t& word = part[c / kVector].word[c % kVector / kPerWord];
            word = c % kPerWord == 0 ? bits : word | bits << 16;
        }
    }

    __device__ __forceinline__ void values(float (&to)[C]) const {
#pragma unroll
        for (int p = 0; p < kParts; ++p) {
            float value[kVector];
            unpack(part[p], kType<T>, value);
#pragma unroll
            for (int k = 0; k < kVector; ++k) to[p * kVector + k] = value[k];
        }
    }
};

// What a lane knows of each query: the keys that its team has seen, and their weighted values in the lane's columns.
template <int C, int Q>
struct Seen {
    float top[Q], total[Q], sum[Q][C];  // the largest score; of exp(score - top); of exp(score - top) * factor * value
    unsigned any;                       // a bit for each query that some key is allowed for

    __device__ __forceinline__ Seen() : any(0) {
#pragma unroll
        for (int n = 0; n < Q; ++n) {
            top[n] = -INFINITY, total[n] = 0.0f;
#pragma unroll
            for (int c = 0; c < C; ++c) sum[n][c] = 0.0f;
        }
    }

    __device__ __forceinline__ void rescale(int n, float scale) {
        total[n] *= scale;
#pragma unroll
        for (int c = 0; c < C; ++c) sum[n][c] *= scale;
    }
};

// What is subtracted from scores: their maximum, but no infinity that would turn all the weights so far into NaN.
__device__ __forceinline__ float base_of(float top) { return top == -INFINITY ? 0.0f : top; }

__device__ __forceinline__ float larger(float a, float b) { return a > b ? a : b; }

// Dropout's factor for key j, the prompt's counted first, of the group's query n.
__device__ __forceinline__ float factor_at(const DropoutKey& key, const Group& g, int64_t H, int n, int64_t j) {
    const uint64_t counter = static_cast<uint64_t>(g.i + n) << 32 | static_cast<uint64_t>(j / 8);
    const fp::PhiloxBlock block = philox(key.seed, counter, static_cast<uint32_t>(g.b * H + g.h));
    return key.keeps(block, j % 8) ? key.dropout.scale : 0.0f;
}

// U keys of a team: loaded all at once, then scored, then added to what has been seen.
template <class T, int C, int Q>
struct Batch {
    // 64 bytes of keys and as many of values in flight; half that where several queries take registers.
    static constexpr int U = (Q == 1 ? 64 : 32) / (C * static_cast<int>(sizeof(T)));
    Columns<T, C> k[U], v[U];
    float score[U][Q];
    int64_t j[U];         // row of the source
    unsigned allowed[U];  // a bit per query

    // `queries` has a bit for each query that counts.
    __device__ __forceinline__ void load_rows(const Source<T>& s, int64_t first, int64_t step, unsigned queries,
                                              bool aligned) {
#pragma unroll
        for (int u = 0; u < U; ++u) {
            j[u] = first + u * step;
            allowed[u] = j[u] < s.count && (s.mask == nullptr || s.mask[j[u]] != 0) ? queries : 0;
            if (!s.causal) continue;
#pragma unroll
            for (int n = 0; n < Q; ++n) allowed[u] &= s.distance + j[u] > n ? ~(1u << n) : ~0u;
        }
#pragma unroll
        for (int u = 0; u < U; ++u) k[u] = {}, v[u] = {};
        if (aligned) {
#pragma unroll
            for (int u = 0; u < U; ++u) {
                if (allowed[u] == 0) continue;
                k[u].load_vectors(s.k + j[u] * s.k_row);
                v[u].load_vectors(s.v + j[u] * s.v_row);
            }
        } else {
#pragma unroll
            for (int u = 0; u < U; ++u) {
                if (allowed[u] == 0) continue;
                k[u].load_elements(s.k + j[u] * s.k_row);
                v[u].load_elements(s.v + j[u] * s.v_row);
            }
        }
    }

    // `lanes` are a team's. All lanes of the warp must call.
    __device__ __forceinline__ void multiply(const float (&q)[Q][C], int lanes) {
#pragma unroll
        for (int u = 0; u < U; ++u) {
            float key[C];
            k[u].values(key);
#pragma unroll
            for (int n = 0; n < Q; ++n) {
                score[u][n] = 0.0f;
#pragma unroll
                for (int c = 0; c < C; ++c) score[u][n] += q[n][c] * key[c];
            }
        }
        for (int other = lanes / 2; other > 0; other /= 2) {
#pragma unroll
            for (int u = 0; u < U; ++u) {
#pragma unroll
                for (int n = 0; n < Q; ++n) score[u][n] += __shfl_xor_sync(0xffffffffu, score[u][n], other);
            }
        }
    }

    // `bias` is that of distance 0; null: none.
    __device__ __forceinline__ void add_bias(const Source<T>& s, const float* bias, int64_t M) {
        if (bias == nullptr) return;
#pragma unroll
        for (int u = 0; u < U; ++u) {
#pragma unroll
            for (int n = 0; n < Q; ++n) score[u][n] += bias[clamp(s.distance + j[u] - n, -M, M)];
        }
    }

    __device__ __forceinline__ void clear_scores() {
#pragma unroll
        for (int u = 0; u < U; ++u) {
#pragma unroll
            for (int n = 0; n < Q; ++n) score[u][n] = 0.0f;
        }
    }

    // Scores become exp(score - top), 0 where not allowed.
    __device__ __forceinline__ void weigh(Seen<C, Q>& seen) {
#pragma unroll
        for (int n = 0; n < Q; ++n) {
            float top = seen.top[n];
#pragma unroll
            for (int u = 0; u < U; ++u) {
                if ((allowed[u] >> n & 1) != 0) top = larger(score[u][n], top);  // a NaN is left to the sum
            }
            const float base = base_of(top);
            seen.rescale(n, expf(seen.top[n] - base));
            seen.top[n] = top;
#pragma unroll
            for (int u = 0; u < U; ++u) {
                score[u][n] = (allowed[u] >> n & 1) != 0 ? expf(score[u][n] - base) : 0.0f;
                seen.total[n] += score[u][n];
            }
        }
    }

    // `first` is the number of the source's row 0 among all keys.
    __device__ __forceinline__ void drop_weights(const DropoutKey& key, const Group& g, int64_t H, int64_t first) {
        if (key.dropout.seed == nullptr) return;
#pragma unroll
        for (int u = 0; u < U; ++u) {
#pragma unroll
            for (int n = 0; n < Q; ++n) score[u][n] *= factor_at(key, g, H, n, first + j[u]);
        }
    }

    // Scores are weights by now, times dropout's factors. A value that is not allowed may be NaN: it adds nothing.
    __device__ __forceinline__ void add_values(Seen<C, Q>& seen) const {
#pragma unroll
        for (int u = 0; u < U; ++u) {
            float value[C];
            v[u].values(value);
            seen.any |= allowed[u];
#pragma unroll
            for (int n = 0; n < Q; ++n) {
                if ((allowed[u] >> n & 1) == 0) continue;
#pragma unroll
                for (int c = 0; c < C; ++c) seen.sum[n][c] += score[u][n] * value[c];
            }
        }
    }
};

// Adds a source's keys to `seen`, for the queries with a bit in `queries`. Starved rows weigh all keys alike.
template <class T, int C, int Q>
__device__ __forceinline__ void attend_source(const Decode& d, const DropoutKey& key, const Group& g,
                                              const Source<T>& source, const float (&q)[Q][C], unsigned queries,
                                              bool starved, Seen<C, Q>& seen) {
    using Keys = Batch<T, C, Q>;
    const int lanes = static_cast<int>(d.a.K) / C, teams = kThreads / lanes;
    const int team = static_cast<int>(threadIdx.x) / lanes;
    const float* bias = d.a.bias == nullptr ? nullptr : d.a.bias + g.h * (2 * d.a.M + 1) + d.a.M;
    for (int64_t begin = 0; begin < source.count; begin += teams * Keys::U) {
        Keys keys;
        keys.load_rows(source, begin + team, teams, queries, d.aligned);
        keys.multiply(q, lanes);
        keys.add_bias(source, bias, d.a.M);
        if (starved) keys.clear_scores();
        keys.weigh(seen);
        keys.drop_weights(key, g, d.a.H, source.first);
        keys.add_values(seen);
    }
}

// Joins what the teams of a warp have seen, for all lanes.
template <int C, int Q>
__device__ __forceinline__ void join_teams(Seen<C, Q>& seen, int lanes) {
    for (int other = lanes; other < 32; other *= 2) {
#pragma unroll
        for (int n = 0; n < Q; ++n) {
            const float top = larger(seen.top[n], __shfl_xor_sync(0xffffffffu, seen.top[n], other));
            seen.rescale(n, expf(seen.top[n] - base_of(top)));
            seen.top[n] = top;
            seen.total[n] += __shfl_xor_sync(0xffffffffu, seen.total[n], other);
#pragma unroll
            for (int c = 0; c < C; ++c) seen.sum[n][c] += __shfl_xor_sync(0xffffffffu, seen.sum[n][c], other);
        }
    }
}

__device__ __forceinline__ unsigned warp_or(unsigned bits) {
#pragma unroll
    for (int other = 16; other > 0; other /= 2) bits |= __shfl_xor_sync(0xffffffffu, bits, other);
    return bits;
}

template <class T, int C, int Q>
__device__ __forceinline__ void load_queries(const Decode& d, const Group& g, int64_t column, float (&q)[Q][C]) {
    const fp::Strides& s = d.a.q_strides;
    const int64_t first = g.b * s.example + g.i * s.row + g.h * s.head + column;
#pragma unroll
    for (int n = 0; n < Q; ++n) {
        Columns<T, C> columns = {};
        const T* from = static_cast<const T*>(d.a.q) + first + n * s.row;
        if ((g.queries >> n & 1) != 0) {
            if (d.aligned) {
                columns.load_vectors(from);
            } else {
                columns.load_elements(from);
            }
        }
        columns.values(q[n]);
    }
}

// A query's sum and total over the block, from what its warps have seen.
struct Joined {
    float top, total, scale[kWarps];

    template <class F>
    __device__ __forceinline__ Joined(F& tops, F& totals, int n, int Q) : top(-INFINITY), total(0.0f) {
#pragma unroll
        for (int w = 0; w < kWarps; ++w) top = larger(static_cast<float>(tops[w * Q + n]), top);
#pragma unroll
        for (int w = 0; w < kWarps; ++w) {
            scale[w] = expf(tops[w * Q + n] - base_of(top));
            total += totals[w * Q + n] * scale[w];
        }
    }
};

// A bit for each query of the group that no key is allowed for. All threads of the block must call.
template <class A>
__device__ __forceinline__ unsigned find_starved(const Group& g, unsigned any, A& anys) {
    any = warp_or(any);
    if (threadIdx.x % 32 == 0) anys[threadIdx.x / 32] = any;
    __syncthreads();
    unsigned starved = g.queries;
    for (int w = 0; w < kWarps; ++w) starved &= ~anys[w];
    return starved;
}

// A lane of the first team holds what its warp has seen. sums: [kWarps, Q, K]; tops, totals: [kWarps, Q].
template <int C, int Q, class A, class S>
__device__ __forceinline__ void share_sums(const Seen<C, Q>& seen, int K, A& sums, S& tops, S& totals) {
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int n = 0; n < Q; ++n) {
        if (lane == 0) tops[warp * Q + n] = seen.top[n], totals[warp * Q + n] = seen.total[n];
        if (lane >= K / C) continue;
#pragma unroll
        for (int c = 0; c < C; ++c) sums[(warp * Q + n) * K + lane * C + c] = seen.sum[n][c];
    }
}

template <class T, int Q, class A, class S>
__device__ __forceinline__ void store_outputs(const Decode& d, const Group& g, unsigned starved, A& sums, S& tops,
                                              S& totals) {
    const int K = static_cast<int>(d.a.K);
    for (int e = static_cast<int>(threadIdx.x); e < Q * K; e += kThreads) {
        const int n = e / K;
        if ((g.queries >> n & 1) == 0) return;
        const Joined joined(tops, totals, n, Q);
        float sum = 0.0f;
        for (int w = 0; w < kWarps; ++w) sum += sums[w * Q * K + e] * joined.scale[w];
        const bool no_keys = (starved >> n & 1) != 0 && g.own_keys <= 0;
        const float value = !g.valid ? NAN : no_keys ? 0.0f : sum / joined.total;
        static_cast<T*>(d.out)[((g.row(d.a) + n) * d.a.H + g.h) * K + e % K] = from_float<T>(value);
    }
}

template <int Q, class S>
__device__ __forceinline__ void store_stats(const Decode& d, const Group& g, unsigned starved, S& tops, S& totals) {
    const int n = static_cast<int>(threadIdx.x);
    if (n >= Q || (g.queries >> n & 1) == 0) return;
    const Joined joined(tops, totals, n, Q);
    const bool no_key = (starved >> n & 1) != 0;
    // A total of 0 would say that no key was allowed; scores that are all -inf are NaN after the softmax.
    const float total = joined.top == -INFINITY ? NAN : joined.total;
    float* stats = d.stats + g.h * d.a.N + g.row(d.a) + n;
    stats[0] = !g.valid ? NAN : no_key ? 0.0f : joined.top;
    stats[d.a.H * d.a.N] = !g.valid ? NAN : no_key ? 0.0f : total;
}

template <class T, int C, int Q>
__global__ void __launch_bounds__(kThreads, kBlocks<Q>) attend(const Decode d) {
    constexpr int kRows = kWarps * Q;
    FP_SHARED(float, sums, kRows * 32 * C);
    FP_SHARED(float, tops, kRows);
    FP_SHARED(float, totals, kRows);
    FP_SHARED(unsigned, anys, kWarps);
    const int K = static_cast<int>(d.a.K), lanes = K / C, column = static_cast<int>(threadIdx.x) % lanes * C;
    const DropoutKey key(d.dropout);
    for (int64_t item = blockIdx.x; item < d.items; item += gridDim.x) {
        const Group g(d.a, item, Q);
        float q[Q][C];
        load_queries<T>(d, g, column, q);
        Seen<C, Q> seen;
        unsigned starved = 0;
        // Turn 0: the prompt's keys. 1: the example's own. 2: these again, for queries that no key is allowed for.
        for (int turn = 0; turn < 3; ++turn) {
            const bool again = turn == 2;
            if (again) starved = find_starved(g, seen.any, anys);
            if (again && starved == 0) break;
            const Source<T> source =
                turn == 0 ? prompt_source<T>(d.a, g, column) : own_source<T, Q>(d.a, g, column, again);
            attend_source<T>(d, key, g, source, q, again ? starved : g.queries, again, seen);
        }
        join_teams(seen, lanes);
        // Nobody reads the last item's shared sums any more: find_starved has a barrier.
        share_sums(seen, K, sums, tops, totals);
        __syncthreads();
        store_outputs<T, Q>(d, g, starved, sums, tops, totals);
        store_stats<Q>(d, g, starved, tops, totals);
    }
}

// Whether all rows of the tensor begin at multiples of 16 bytes.
inline bool is_aligned(const void* address, const fp::Strides& s, int64_t bytes) {
    return address == nullptr || (reinterpret_cast<uintptr_t>(address) % 16 == 0 && s.example * bytes % 16 == 0 &&
                                  s.row * bytes % 16 == 0 && s.head * bytes % 16 == 0);
}

template <class T, int C>
int64_t launch_attend(Decode& d, void* stream) {
    const bool shared = d.a.T > 1;
    const int64_t groups = shared ? (d.a.T + kQueries - 1) / kQueries : 1;
    d.items = d.a.B * d.a.H * groups;
    auto* kernel = shared ? attend<T, C, kQueries> : attend<T, C, 1>;
    return launch(kernel, dim3(limit_blocks(d.items)), dim3(kThreads), stream, d);
}

int64_t t5_attention(const fp::Tensor* q, const fp::Tensor* k, const fp::Tensor* v, const fp::Tensor* bias,
                     const fp::Tensor* prompt_k, const fp::Tensor* prompt_v, const int64_t* prompt_ids,
                     const int64_t* prompt_lens, const uint8_t* key_mask, const int64_t* offsets,
                     const fp::Tensor* cu_q, const int64_t* /*cu_k*/, const int64_t* seed, void* out, float* stats,
                     int64_t offset, int64_t causal, double dropout_p, int64_t dtype, void* stream) {
    if (cu_q != nullptr) return fp::kBadOption;
    const fp::Attention a = attention(q, k, v, bias, prompt_k, prompt_v, prompt_ids, prompt_lens, key_mask, offsets,
                                      nullptr, nullptr, offset, causal);
    if (a.N * a.H == 0) return 0;
    const int64_t bytes = size_of(dtype);
    const bool aligned = is_aligned(a.q, a.q_strides, bytes) && is_aligned(a.k, a.k_strides, bytes) &&
                         is_aligned(a.v, a.v_strides, bytes) && is_aligned(a.prompt_k, a.prompt_k_strides, bytes) &&
                         is_aligned(a.prompt_v, a.prompt_v_strides, bytes);
    Decode d = {a, make_dropout(seed, dropout_p), out, stats, aligned, 0};
    if (dtype == fp::kBFloat16) return launch_attend<fp::bf16, 8>(d, stream);
    if (dtype == fp::kFloat16) return launch_attend<fp::fp16, 8>(d, stream);
    return a.K == 256 ? launch_attend<float, 8>(d, stream) : launch_attend<float, 4>(d, stream);
}

FP_KERNEL(t5_attention);

}  // namespace

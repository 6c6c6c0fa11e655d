// SPDX-License-Identifier: Apache-2.0
// The backward pass of t5_attention. A block of queries has all its weights and their gradients in the second-level
// cache, so that dout . out of a row is summed from them and nobody has to keep out.

#include "common/attention.h"
#include "common/integers.h"
#include "common/kernel.h"
#include "cpu/exp.h"
#include "cpu/lanes.h"
#include "cpu/simd.h"
#include "cpu/t5_attention.h"

namespace {

constexpr uint32_t kSign = 1u << 31;

struct Backward : Work {
    using Work::Work;
    static constexpr bool kHasParts = false;              // all queries add to the gradients of the keys
    Factor *value_panels = nullptr, *key_rows = nullptr;  // [panels][K][kPanel]; [keys][K]
    float *dout = nullptr, *dq = nullptr;                 // [kQueries][K]
    Products::Queries dout_factor;
    float* dweights = nullptr;  // [chunks][kQueries][kScoreRow]; the scores' gradients take their place
    Products::KeySums dkeys, dvalues;
    float *few_dk = nullptr, *few_dv = nullptr;          // [keys][K], of few queries
    float *starved_dk = nullptr, *starved_dv = nullptr;  // [own][K], of rows that may attend to nothing,
    bool starved = false;                                // if there are any
    float* delta = nullptr;                              // [kQueries]

    void cut(Arena& arena, const Limits& most) {
        const int64_t keys_elements = panelled(most) * a.K, chunks = round_up(most.keys, kKeys) / kKeys;
        Work::cut(arena, most, chunks);
        value_panels = arena.take<Factor>(panelled(most) * Products::depth(a.K));
        key_rows = arena.take<Factor>(keys_elements);
        dout = arena.take<float>(kQueries * a.K);
        dq = arena.take<float>(kQueries * a.K);
        dout_factor.cut(arena, a.K);
        dweights = arena.take<float>(chunks * kQueries * kScoreRow);
        dkeys.cut(arena, panelled(most), a.K);
        dvalues.cut(arena, panelled(most), a.K);
        few_dk = arena.take<float>(keys_elements);
        few_dv = arena.take<float>(keys_elements);
        starved_dk = arena.take<float>(keys_elements);
        starved_dv = arena.take<float>(keys_elements);
        delta = arena.take<float>(kQueries);
    }

    void run(const void* dout_rows, const float* stats, void* dq_rows, void* dk_rows, void* dv_rows, float* share_k,
             float* share_v);
    void run_blocks(const void* dout_rows, const float* stats, void* dq_rows);
    void run_block(int64_t first, int64_t count);
    void run_few(const void* dout_rows, const float* stats, void* dq_rows);
    template <class Run>
    void each_chunk_of_keys(int64_t most, const Run& run) const;
    void weigh_again(int64_t i, int64_t row, int64_t chunk, int64_t width, float* s, float* dw);
    template <class Weight>
    void differentiate(int64_t row, int64_t chunk, int64_t width, float* s, float* dw) const;
    bool is_silent(const void* dout_rows, const float* stats, int64_t i) const;
    bool keys_are_finite() const;
    void clear_queries(void* dq_rows, int64_t first, int64_t end) const;
    void load_gradients(const void* dout_rows, const float* stats, int64_t first, int64_t count);
    void starve_rows(int64_t first, int64_t count);
    void starve(int64_t i, int64_t row);
    void store_keys(const float* dkey_rows, const float* dvalue_rows, void* dk_rows, void* dv_rows, float* share_k,
                    float* share_v) const;
};

// s [width] of row `row`: scores become weights, negative where dropped. dw: gradients of the weights, with dropout.
// Their product adds to delta. A NaN may have either sign: times 0 or not, it stays one.
void Backward::weigh_again(int64_t i, int64_t row, int64_t chunk, int64_t width, float* s, float* dw) {
    const int64_t allowed = allowed_in(row, chunk, width);
    const float* bias_row = a.bias == nullptr ? nullptr : bias_of(i);
    const bool drops = dropout.active();
    if (drops && allowed > 0) draw(i, chunk, allowed);
    const float high = top[row], inverse = 1.0f / total[row];
    RowTotal sum;
    for (int64_t n = 0; n < allowed; n += kLanes) {
        vfloat value = load(s + n);
        if (bias_row != nullptr) value += keys.at(bias_row, chunk + n);
        vfloat weight = exp(value - high) * inverse, dweight = load(dw + n);
        if (n + kLanes > allowed) {
            weight = first_lanes(weight, allowed - n, 0.0f), dweight = first_lanes(dweight, allowed - n, 0.0f);
        }
        vuint dropped{};
        if (drops) {
            const vfloat factor = keys.at(factors, chunk + n);
            dweight *= factor;  // of what is not finite NaN, also where it is dropped, as in PyTorch
            dropped = bit_cast<vuint>(factor == 0.0f) & kSign;
        }
        sum.part = fused_multiply_add(weight, dweight, sum.part);
        sum.end_vector(n);
        store(s + n, bit_cast<vfloat>(bit_cast<vuint>(weight) | dropped));
        store(dw + n, dweight);
    }
    delta[row] += sum.total();
}

// Of what weigh_again left, s becomes weights times dropout's factors, dw the gradient of the scores, both as factors.
template <class Weight>
void Backward::differentiate(int64_t row, int64_t chunk, int64_t width, float* s, float* dw) const {
    const int64_t allowed = allowed_in(row, chunk, width);
    auto *weights = reinterpret_cast<Weight*>(s), *dscores = reinterpret_cast<Weight*>(dw);
    const bool drops = dropout.active();
    const float mean = delta[row], scale = dropout.scale();
    for (int64_t n = 0; n < allowed; n += kLanes) {
        const vuint bits = bit_cast<vuint>(load(s + n));
        const vfloat weight = bit_cast<vfloat>(bits & ~kSign), gradient = weight * (load(dw + n) - mean);
        const vfloat factor = (bits & kSign) == 0u ? splat(scale) : vfloat{};
        store_weight(weights + n, drops ? weight * factor : weight);
        store_weight(dscores + n, gradient);
    }
    clear_weights(weights, allowed, width);
    clear_weights(dscores, allowed, width);
}

// run(chunk, width, scores, dweights) for the keys [0, most).
template <class Run>
void Backward::each_chunk_of_keys(int64_t most, const Run& run) const {
    for (int64_t chunk = 0; chunk < most; chunk += kKeys) {
        const int64_t block = chunk / kKeys * kQueries * kScoreRow;
        run(chunk, most - chunk < kKeys ? most - chunk : kKeys, scores + block, dweights + block);
    }
}

void Backward::run_block(int64_t first, int64_t count) {
    const int64_t most = limit[count - 1], D = Products::depth(a.K);
    each_chunk_of_keys(most, [&](int64_t chunk, int64_t width, float* s, float* dw) {
        Products::score(q_factor, count, key_panels + chunk * D, width, a.K, s);
        Products::score(dout_factor, count, value_panels + chunk * D, width, a.K, dw);
        for (int64_t i = 0; i < count; ++i) {
            weigh_again(first + i, i, chunk, width, s + i * kScoreRow, dw + i * kScoreRow);
        }
    });
    each_chunk_of_keys(most, [&](int64_t chunk, int64_t width, float* s, float* dw) {
        for (int64_t i = 0; i < count; ++i) {
            differentiate<Factor>(i, chunk, width, s + i * kScoreRow, dw + i * kScoreRow);
        }
        const auto *weights = reinterpret_cast<Factor*>(s), *dscores = reinterpret_cast<Factor*>(dw);
        dvalues.add(weights, count, dout_factor, chunk, width, a.K);
        dkeys.add(dscores, count, q_factor, chunk, width, a.K);
        Products::sum_rows(dscores, count, key_rows + chunk * a.K, width, a.K, dq);
    });
}

// A few queries: keys and values are read where they lie, with the forward pass's sums, whose order a weight must not
// depend on.
void Backward::run_few(const void* dout_rows, const float* stats, void* dq_rows) {
    find_rows();
    load_gradients(dout_rows, stats, 0, T);
    clear(dq, T * a.K);
    const int64_t most = limit[T - 1];  // all keys: those behind the last query were left out
    each_chunk_of_keys(most, [&](int64_t chunk, int64_t width, float* s, float* dw) {
        few_keys.score(q, T, chunk, width, s);
        few_values.score(dout, T, chunk, width, dw);
        for (int64_t i = 0; i < T; ++i) weigh_again(i, i, chunk, width, s + i * kScoreRow, dw + i * kScoreRow);
    });
    each_chunk_of_keys(most, [&](int64_t chunk, int64_t width, float* s, float* dw) {
        for (int64_t i = 0; i < T; ++i) {
            differentiate<float>(i, chunk, width, s + i * kScoreRow, dw + i * kScoreRow);
        }
        few_keys.add(dw, T, chunk, width, dq);
        multiply({s, 1, kScoreRow}, width, dout, a.K, a.K, few_dv + chunk * a.K, a.K, T, false);
        multiply({dw, 1, kScoreRow}, width, q, a.K, a.K, few_dk + chunk * a.K, a.K, T, false);
    });
    starve_rows(0, T);
    store_rows(dq, dq_rows, rows_from(0), dtype, T, a.K);
}

void Backward::starve_rows(int64_t first, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        if (limit[i] > 0) continue;
        if (!starved) {
            clear(starved_dk, keys.own * a.K);
            clear(starved_dv, keys.own * a.K);
            starved = true;
        }
        starve(first + i, i);
    }
}

// The gradient of a row that took the mean of all own values.
void Backward::starve(int64_t i, int64_t row) {
    float key[256], value[256], *dweights_of_row = dweights;  // whose rows have had their turn
    const float *row_q = q + row * a.K, *row_dout = dout + row * a.K;
    float* row_dq = dq + row * a.K;
    if (dropout.active()) {
        dropout.factors(i << 35, keys.own, factors, static_cast<uint32_t>(b * a.H + h));
    }
    const float weight = 1.0f / static_cast<float>(keys.own);
    for (int64_t s = 0; s < keys.own; ++s) {
        load_key(s, true, value);
        const float factor = dropout.active() ? factors[s] : 1.0f;
        vfloat dweight{};
        for (int64_t d = 0; d < a.K; d += kLanes) dweight += load(row_dout + d) * load(value + d);
        dweights_of_row[s] = factor * sum_lanes(dweight);
        delta[row] += weight * dweights_of_row[s];
    }
    for (int64_t s = 0; s < keys.own; ++s) {
        load_key(s, false, key);
        const float factor = weight * (dropout.active() ? factors[s] : 1.0f);
        const float dscore = weight * (dweights_of_row[s] - delta[row]);
        float *dk = starved_dk + s * a.K, *dv = starved_dv + s * a.K;
        for (int64_t d = 0; d < a.K; d += kLanes) {
            store(row_dq + d, load(row_dq + d) + dscore * load(key + d));
            store(dk + d, load(dk + d) + dscore * load(row_q + d));
            store(dv + d, load(dv + d) + factor * load(row_dout + d));
        }
    }
}

// Is the gradient of the output of query i zero, as it is where the model's padding is? Such a query adds nothing.
bool Backward::is_silent(const void* dout_rows, const float* stats, int64_t i) const {
    float row[256];
    if (i >= kRowsAhead) fetch_row(dout_rows, row_offset(i - kRowsAhead), dtype, a.K);  // for who reads from the last
    load_row(dout_rows, row_offset(i), dtype, row, a.K);
    vfloat size{};
    for (int64_t d = 0; d < a.K; d += kLanes) size += load(row + d) < 0.0f ? -load(row + d) : load(row + d);
    const float most = stats[stats_offset(i)], sum = stats[a.H * a.N + stats_offset(i)];
    const bool finite =
        __builtin_isfinite(most) && __builtin_isfinite(sum);  // NaN and infinity among scores must spread
    // A starved query, whose sum is zero, reads keys that nobody has looked at.
    return finite && sum != 0.0f && sum_lanes(size) == 0.0f;
}

// Zero times one that is not is NaN, in a silent query's gradients, too.
bool Backward::keys_are_finite() const {
    vfloat sum{};
    for (int64_t n = 0; n < round_up(keys.count, kPanel) * Products::depth(a.K); n += kLanes) {
        sum += load(key_panels + n) * 0.0f + load(value_panels + n) * 0.0f;
    }
    return sum_lanes(sum) == 0.0f;
}

void Backward::clear_queries(void* dq_rows, int64_t first, int64_t end) const {
    const float zeros[256] = {};
    for (int64_t i = first; i < end; ++i) store_row(zeros, dq_rows, row_offset(i), dtype, a.K);
}

// Loads a block of queries and the gradients of their outputs; delta is still to be summed.
void Backward::load_gradients(const void* dout_rows, const float* stats, int64_t first, int64_t count) {
    load_queries(first, count);
    load_rows(dout_rows, rows_from(first), dtype, dout, count, a.K);
    for (int64_t i = 0; i < count; ++i) {
        delta[i] = 0.0f;
        top[i] = stats[stats_offset(first + i)];
        total[i] = stats[a.H * a.N + stats_offset(first + i)];
    }
}

// Gradients of keys and values to where these came from; zero for keys that nothing may attend to.
void Backward::store_keys(const float* dkey_rows, const float* dvalue_rows, void* dk_rows, void* dv_rows,
                          float* share_k, float* share_v) const {
    const float zeros[256] = {};
    for (int64_t p = 0; p < a.P; ++p) {
        const int64_t to = ((b * a.P + p) * a.H + h) * a.K;
        store_row(p < keys.prompt ? dkey_rows + p * a.K : zeros, share_k, to, fp::kFloat32, a.K);
        store_row(p < keys.prompt ? dvalue_rows + p * a.K : zeros, share_v, to, fp::kFloat32, a.K);
    }
    const auto row = [&](int64_t s) { return ((a.key_begin(b) + s) * a.H + h) * a.K; };
    const auto ask = [&](int64_t s) {
        fetch_row(dk_rows, row(s), dtype, a.K);
        fetch_row(dv_rows, row(s), dtype, a.K);
    };
    int64_t n = keys.prompt;
    each_row_ahead(keys.own, ask, [&](int64_t s) {
        const bool allowed = n < keys.count && keys.index[n] == keys.prompt + s;
        const float *from_k = allowed ? dkey_rows + n * a.K : zeros, *from_v = allowed ? dvalue_rows + n * a.K : zeros;
        if (starved) {
            float *sum_k = starved_dk + s * a.K, *sum_v = starved_dv + s * a.K;
            for (int64_t d = 0; d < a.K; ++d) sum_k[d] += from_k[d], sum_v[d] += from_v[d];
            from_k = sum_k, from_v = sum_v;
        }
        store_row(from_k, dk_rows, row(s), dtype, a.K);
        store_row(from_v, dv_rows, row(s), dtype, a.K);
        n += allowed ? 1 : 0;
    });
}

void Backward::run_blocks(const void* dout_rows, const float* stats, void* dq_rows) {
    Products::pack_panels(keys.count, a.K, gathered(false), key_panels);
    Products::pack_panels(keys.count, a.K, gathered(true), value_panels);
    Products::pack_rows(keys.count, a.K, gathered(false), key_rows);
    dkeys.clear(keys.count, a.K);
    dvalues.clear(keys.count, a.K);
    int64_t begin = 0, end = T;
    while (begin < end && is_silent(dout_rows, stats, begin)) ++begin;
    while (begin < end && is_silent(dout_rows, stats, end - 1)) --end;
    if (end - begin < T && !keys_are_finite()) begin = 0, end = T;
    clear_queries(dq_rows, 0, begin);
    clear_queries(dq_rows, end, T);
    for (int64_t first = begin; first < end; first += kQueries) {
        const int64_t count = end - first < kQueries ? end - first : kQueries;
        load_gradients(dout_rows, stats, first, count);
        q_factor.lay_out(q, count, a.K, true);
        dout_factor.lay_out(dout, count, a.K, true);
        clear(dq, count * a.K);
        run_block(first, count);
        starve_rows(first, count);
        store_rows(dq, dq_rows, rows_from(first), dtype, count, a.K);
    }
}

void Backward::run(const void* dout_rows, const float* stats, void* dq_rows, void* dk_rows, void* dv_rows,
                   float* share_k, float* share_v) {
    starved = false;
    if (T > 0 && T <= kFewQueries) {
        run_few(dout_rows, stats, dq_rows);
        store_keys(few_dk, few_dv, dk_rows, dv_rows, share_k, share_v);
    } else {
        run_blocks(dout_rows, stats, dq_rows);
        store_keys(dkeys.rows(a.K), dvalues.rows(a.K), dk_rows, dv_rows, share_k, share_v);
    }
}

int64_t t5_attention_backward(const void* dout, const float* stats, const fp::Tensor* q, const fp::Tensor* k,
                              const fp::Tensor* v, const fp::Tensor* bias, const fp::Tensor* prompt_k,
                              const fp::Tensor* prompt_v, const int64_t* prompt_ids, const int64_t* prompt_lens,
                              const uint8_t* key_mask, const int64_t* offsets, const fp::Tensor* cu_q,
                              const int64_t* cu_k, const int64_t* seed, void* dq, void* dk, void* dv, float* share_k,
                              float* share_v, int64_t offset, int64_t causal, double dropout_p, int64_t dtype,
                              void* /*stream*/) {
    const fp::Attention a = attention(q, k, v, bias, prompt_k, prompt_v, prompt_ids, prompt_lens, key_mask, offsets,
                                      cu_q, cu_k, offset, causal);
    return each_head<Backward>(a, seed, dropout_p, dtype, [&](Backward& pass, int64_t /*part*/, int64_t /*parts*/) {
        pass.run(dout, stats, dq, dk, dv, share_k, share_v);
    });
}

FP_KERNEL(t5_attention_backward);

}  // namespace

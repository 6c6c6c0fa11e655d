// SPDX-License-Identifier: Apache-2.0
// The forward pass of t5_attention: the online softmax, chunk of keys by chunk; few queries read their keys in place.
#include "cpu/t5_attention.h"

#include <math.h>
#include <string.h>

#include "common/attention.h"
#include "common/kernel.h"
#include "cpu/exp.h"
#include "cpu/lanes.h"
#include "cpu/simd.h"

namespace {

struct Forward : Work {
    using Work::Work;
    static constexpr bool kHasParts = true;
    Factor* value_rows = nullptr;  // [keys][K]
    float* out = nullptr;          // [kQueries][K]
    float* mean = nullptr;         // [K], of the values of example and head mean_of
    int64_t mean_of = -1;          // b * H + h

    void cut(Arena& arena, const Limits& most) {
        Work::cut(arena, most, 1);
        value_rows = arena.take<Factor>(panelled(most) * a.K);
        out = arena.take<float>(kQueries * a.K);
        mean = arena.take<float>(a.K);
    }

    void run(void* to, float* stats, int64_t part, int64_t parts);
    void run_block(int64_t first, int64_t count);
    template <class Weight>
    void weigh(int64_t i, int64_t row, int64_t chunk, int64_t width);
    void run_few(void* to, float* stats);
    void finish_rows(int64_t first, int64_t count, void* to, float* stats);
    void starve(int64_t i, float* row);
    void average(int64_t i, float* row) const;
};

// Turns a row of scores into weights, where the scores were, by the online softmax: top and total are the row's so far,
// out is rescaled.
template <class Weight>
void Forward::weigh(int64_t i, int64_t row, int64_t chunk, int64_t width) {
    float* s = scores + row * kScoreRow;
    auto* weights = reinterpret_cast<Weight*>(s);
    const int64_t allowed = allowed_in(row, chunk, width);
    if (allowed == 0) return clear_weights(weights, 0, width);
    vfloat most = splat(-INFINITY);
    const float* bias_row = a.bias == nullptr ? nullptr : bias_of(i);
    for (int64_t n = 0; n < allowed; n += kLanes) {
        vfloat value = load(s + n);
        if (bias_row != nullptr) value += keys.at(bias_row, chunk + n);
        if (n + kLanes > allowed) value = first_lanes(value, allowed - n, -INFINITY);
        store(s + n, value);
        most = value > most ? value : most;
    }
    const float found = largest_lane(most), high = found > top[row] ? found : top[row];
    const float base = high == -INFINITY ? 0.0f : high;  // all scores so far are -inf: weights of 0, not NaN
    const bool drops = dropout.active();
    if (drops) draw(i, chunk, allowed);
    RowTotal sum;
    for (int64_t n = 0; n < allowed; n += kLanes) {
        vfloat weight = exp(load(s + n) - base);
        sum.part += weight;
        sum.end_vector(n);
        if (drops) weight *= keys.at(factors, chunk + n);
        store_weight(weights + n, weight);
    }
    clear_weights(weights, allowed, width);
    const float added = sum.total();
    const vfloat rescale = exp(splat(top[row] - base));
    if (chunk > 0) {
        for (int64_t d = 0; d < a.K; d += kLanes) store(out + row * a.K + d, load(out + row * a.K + d) * rescale);
    }
    total[row] = chunk > 0 ? total[row] * rescale[0] + added : added;
    top[row] = high;
}

void Forward::run_block(int64_t first, int64_t count) {
    load_queries(first, count);
    q_factor.lay_out(q, count, a.K, false);
    clear(out, count * a.K);
    for (int64_t i = 0; i < count; ++i) top[i] = -INFINITY, total[i] = 0.0f;
    const int64_t most = limit[count - 1];  // limits do not fall from row to row
    for (int64_t chunk = 0; chunk < most; chunk += kKeys) {
        const int64_t width = most - chunk < kKeys ? most - chunk : kKeys;
        Products::score(q_factor, count, key_panels + chunk * Products::depth(a.K), width, a.K, scores);
        for (int64_t i = 0; i < count; ++i) weigh<Factor>(first + i, i, chunk, width);
        Products::sum_rows(reinterpret_cast<Factor*>(scores), count, value_rows + chunk * a.K, width, a.K, out);
    }
}

// A row that may attend to nothing takes the mean of the example's own values (there is no prompt then). Without
// dropout all such rows are one.
void Forward::starve(int64_t i, float* row) {
    if (dropout.active()) return average(i, row);
    if (mean_of != b * a.H + h) average(i, mean);
    mean_of = b * a.H + h;
    memcpy(row, mean, a.K * sizeof(float));
}

void Forward::average(int64_t i, float* row) const {
    float value[256];
    clear(row, a.K);
    if (keys.own == 0) return;
    if (dropout.active()) {
        dropout.factors(i << 35, keys.own, factors, static_cast<uint32_t>(b * a.H + h));
    }
    for (int64_t s = 0; s < keys.own; ++s) {
        load_key(s, true, value);
        const float factor = dropout.active() ? factors[s] : 1.0f;
        for (int64_t d = 0; d < a.K; d += kLanes) store(row + d, load(row + d) + factor * load(value + d));
    }
    for (int64_t d = 0; d < a.K; d += kLanes) store(row + d, load(row + d) / static_cast<float>(keys.own));
}

void Forward::finish_rows(int64_t first, int64_t count, void* to, float* stats) {
    for (int64_t i = 0; i < count; ++i) {
        float* row = out + i * a.K;
        const bool starved = limit[i] == 0;
        if (starved) {
            starve(first + i, row);
        } else {
            for (int64_t d = 0; d < a.K; d += kLanes) store(row + d, load(row + d) / total[i]);
        }
        stats[stats_offset(first + i)] = starved ? 0.0f : top[i];
        stats[a.H * a.N + stats_offset(first + i)] = starved ? 0.0f : total[i];
    }
    store_rows(out, to, rows_from(first), dtype, count, a.K);
}

// A few queries: keys and values are read where they lie.
void Forward::run_few(void* to, float* stats) {
    find_rows();
    load_queries(0, T);
    clear(out, T * a.K);
    for (int64_t i = 0; i < T; ++i) top[i] = -INFINITY, total[i] = 0.0f;
    const int64_t most = limit[T - 1];
    for (int64_t chunk = 0; chunk < most; chunk += kKeys) {
        const int64_t width = most - chunk < kKeys ? most - chunk : kKeys;
        few_keys.score(q, T, chunk, width, scores);
        for (int64_t i = 0; i < T; ++i) weigh<float>(i, i, chunk, width);
        few_values.add(scores, T, chunk, width, out);
    }
    finish_rows(0, T, to, stats);
}

// Blocks part, part + parts, ... of this example and head.
void Forward::run(void* to, float* stats, int64_t part, int64_t parts) {
    if (T <= kFewQueries) {
        if (part == 0 && T > 0) run_few(to, stats);
        return;
    }
    Products::pack_panels(keys.count, a.K, gathered(false), key_panels);
    Products::pack_rows(keys.count, a.K, gathered(true), value_rows);
    for (int64_t first = part * kQueries; first < T; first += parts * kQueries) {
        const int64_t count = T - first < kQueries ? T - first : kQueries;
        run_block(first, count);
        finish_rows(first, count, to, stats);
    }
}

int64_t t5_attention(const fp::Tensor* q, const fp::Tensor* k, const fp::Tensor* v, const fp::Tensor* bias,
                     const fp::Tensor* prompt_k, const fp::Tensor* prompt_v, const int64_t* prompt_ids,
                     const int64_t* prompt_lens, const uint8_t* key_mask, const int64_t* offsets,
                     const fp::Tensor* cu_q, const int64_t* cu_k, const int64_t* seed, void* out, float* stats,
                     int64_t offset, int64_t causal, double dropout_p, int64_t dtype, void* /*stream*/) {
    const fp::Attention a = attention(q, k, v, bias, prompt_k, prompt_v, prompt_ids, prompt_lens, key_mask, offsets,
                                      cu_q, cu_k, offset, causal);
    return each_head<Forward>(a, seed, dropout_p, dtype,
                              [&](Forward& pass, int64_t part, int64_t parts) { pass.run(out, stats, part, parts); });
}

FP_KERNEL(t5_attention);

}  // namespace

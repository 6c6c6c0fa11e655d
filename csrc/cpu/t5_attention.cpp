// SPDX-License-Identifier: Apache-2.0
// t5_attention on the CPU: one example and head at a time, in blocks of queries and chunks of keys that stay in the
// caches. Shapes and formulas: fastprompt/ops/t5_attention.py. Everything is fp32 between loads and stores.
//
// Keys that are not allowed are left out when an example's keys are gathered, so they cost nothing.
#include <omp.h>
#include <stdlib.h>

#include <cmath>

#include "common/attention.h"
#include "common/kernel.h"
#include "cpu/gemm.h"
#include "cpu/simd.h"

namespace {

constexpr int64_t kQueries = 72;  // of a block; a multiple of kTileRows
constexpr int64_t kKeys = 256;    // of a chunk
constexpr int64_t kPanel = 64;    // keys side by side in a transposed panel
constexpr int64_t kScoreRow = kKeys + 16;
constexpr int64_t kFewQueries = 4;  // up to so many, transposing the keys would cost more than it brings
constexpr int64_t kNoMemory = -1, kBadDType = -2;

void load_row(const void* from, int64_t offset, int64_t dtype, float* to, int64_t count) {
    with_type(dtype, [&](auto type) {
        const auto* row = static_cast<const decltype(type)*>(from) + offset;
        for (int64_t d = 0; d < count; d += kLanes) store(to + d, load(row + d));
    });
}

void store_row(const float* from, void* to, int64_t offset, int64_t dtype, int64_t count) {
    with_type(dtype, [&](auto type) {
        auto* row = static_cast<decltype(type)*>(to) + offset;
        for (int64_t d = 0; d < count; d += kLanes) store(row + d, load(from + d));
    });
}

int64_t clamp(int64_t value, int64_t low, int64_t high) { return value < low ? low : value > high ? high : value; }

// May write up to kLanes - 1 more.
void fill(float* to, int64_t count, float value) {
    for (int64_t d = 0; d < count; d += kLanes) store(to + d, splat(value));
}

void clear(float* to, int64_t count) { memset(to, 0, static_cast<size_t>(count) * sizeof(float)); }

// Aligned memory of one thread, cut into pieces. Sized by a first pass over the same cuts with base null.
class Arena {
public:
    explicit Arena(char* base) : base_(base) {}
    template <class T>
    T* take(int64_t count) {
        T* piece = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
        used_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
        return piece;
    }
    int64_t used() const { return used_; }

private:
    char* base_;
    int64_t used_ = 0;
};

struct Limits {
    int64_t queries = 0, keys = 0, span = 0;  // the most of any example; span: positions that its distances cover
};

Limits limits(const fp::Attention& a) {
    Limits most;
    for (int64_t b = 0; b < a.B; ++b) {
        const int64_t queries = a.queries(b), keys = a.keys(b) + a.P;
        if (queries > most.queries) most.queries = queries;
        if (keys > most.keys) most.keys = keys;
        if (queries + keys > most.span) most.span = queries + keys;
    }
    return most;
}

// The keys of one example that some query may attend to, in order of position: prompt first. index[n] is key n's place
// among all P + S keys of the example, which fixes its position, index - P, and its dropout.
struct Keys {
    int32_t* index;
    int64_t count, prompt, own;  // `prompt` of the `count` are the prompt's; own: all of the example's, allowed or not

    void gather(const fp::Attention& a, int64_t b) {
        prompt = a.prompt_keys(b);
        own = a.keys(b);
        count = 0;
        for (int64_t p = 0; p < prompt; ++p) index[count++] = static_cast<int32_t>(p);
        const uint8_t* mask = a.key_mask == nullptr ? nullptr : a.key_mask + a.key_begin(b);
        for (int64_t s = 0; s < own; ++s) {
            if (mask == nullptr || mask[s] != 0) index[count++] = static_cast<int32_t>(prompt + s);
        }
        for (int64_t pad = 0; pad < kPanel; ++pad) index[count + pad] = static_cast<int32_t>(prompt + own + pad);
    }

    int64_t source(const fp::Attention& a, int64_t b, int64_t h, int64_t i, bool values) const {
        if (i < prompt) {
            const fp::Strides& s = values ? a.prompt_v_strides : a.prompt_k_strides;
            return a.prompt(b) * s.example + i * s.row + h * s.head;
        }
        return a.own(values ? a.v_strides : a.k_strides, b, a.key_begin(b), i - prompt, h);
    }

    void load_key(const fp::Attention& a, int64_t b, int64_t h, int64_t i, bool values, int64_t dtype,
                  float* to) const {
        const void* base = i < prompt ? (values ? a.prompt_v : a.prompt_k) : (values ? a.v : a.k);
        load_row(base, source(a, b, h, i, values), dtype, to, a.K);
    }

    // Row n of the gathered keys or values, where it lies.
    template <class T>
    FP_INLINE const T* row(const fp::Attention& a, int64_t b, int64_t h, int64_t n, bool values) const {
        const int64_t i = index[n];
        const void* base = i < prompt ? (values ? a.prompt_v : a.prompt_k) : (values ? a.v : a.k);
        return static_cast<const T*>(base) + source(a, b, h, i, values);
    }

    // How many of them a query at `position` may attend to: they are sorted.
    int64_t allowed(const fp::Attention& a, int64_t position) const {
        if (a.causal == 0) return count;
        int64_t low = 0, high = count;
        while (low < high) {
            const int64_t middle = (low + high) / 2;
            (index[middle] - prompt <= position ? low : high) = middle + (index[middle] - prompt <= position ? 1 : 0);
        }
        return low;
    }

    // table[index[n]] for the kLanes keys from n on.
    FP_INLINE vfloat at(const float* table, int64_t n) const {
        const int64_t first = index[n];
        if (index[n + kLanes - 1] - first == kLanes - 1) return load(table + first);
        vfloat value;
        for (int64_t lane = 0; lane < kLanes; ++lane) value[lane] = table[index[n + lane]];
        return value;
    }
};

using WeightDropout = Dropout<true>;

constexpr uint32_t kSign = 1u << 31;

// One example and head. The pieces that a pass does not use have no size.
struct Work {
    Work(const fp::Attention& a, const WeightDropout& dropout, int64_t dtype) : a(a), dropout(dropout), dtype(dtype) {}

    const fp::Attention& a;
    const WeightDropout& dropout;
    const int64_t dtype;
    Keys keys = {};
    int64_t b = -1, h = 0, T = 0, offset = 0;                            // no example yet
    float* bias = nullptr;                                               // by index - query + T - 1
    float* factors = nullptr;                                            // [P + S]: dropout's, of one row
    float *key_panels = nullptr, *value_panels = nullptr;                // [panels][K][kPanel]
    float *key_rows = nullptr, *value_rows = nullptr;                    // [keys][K]
    float *q = nullptr, *out = nullptr, *dout = nullptr, *dq = nullptr;  // [kQueries][K]
    float *scores = nullptr, *dweights = nullptr;                        // [chunks][kQueries][kScoreRow]; forward: one
    float *dkeys = nullptr, *dvalues = nullptr;                          // [keys][K]
    float *starved_dk = nullptr, *starved_dv = nullptr;                  // [own][K], of rows that may attend to nothing
    float *top = nullptr, *total = nullptr, *delta = nullptr;            // [kQueries]
    int64_t* limit = nullptr;                                            // [kQueries]: keys that a row may attend to

    void cut(Arena& arena, const Limits& most, bool backward) {
        const int64_t K = a.K, keys_up = round_up(most.keys, kPanel) + kPanel;
        keys.index = arena.take<int32_t>(keys_up + kPanel);
        bias = arena.take<float>(most.span + 2 * kPanel);
        factors = arena.take<float>(keys_up);
        key_panels = arena.take<float>(keys_up * K);
        (backward ? value_panels : value_rows) = arena.take<float>(keys_up * K);
        q = arena.take<float>(kQueries * K);
        const int64_t chunks = backward ? round_up(most.keys, kKeys) / kKeys : 1;
        scores = arena.take<float>(chunks * kQueries * kScoreRow);
        top = arena.take<float>(kQueries);
        total = arena.take<float>(kQueries);
        limit = arena.take<int64_t>(kQueries);
        if (!backward) {
            out = arena.take<float>(kQueries * K);
            return;
        }
        key_rows = arena.take<float>(keys_up * K);
        dout = arena.take<float>(kQueries * K);
        dq = arena.take<float>(kQueries * K);
        dweights = arena.take<float>(chunks * kQueries * kScoreRow);
        dkeys = arena.take<float>(keys_up * K);
        dvalues = arena.take<float>(keys_up * K);
        starved_dk = arena.take<float>(keys_up * K);
        starved_dv = arena.take<float>(keys_up * K);
        delta = arena.take<float>(kQueries);
    }

    void begin(int64_t task) {
        h = task % a.H;
        if (b != task / a.H) {
            b = task / a.H;
            T = a.queries(b);
            offset = a.query_offset(b);
            keys.gather(a, b);
        }
        if (a.bias != nullptr) lay_out_bias();
    }

    // Entry e is for the distance e - (T - 1) - P - offset, which is clamped to the table's ends.
    void lay_out_bias() {
        const int64_t first = -(T - 1) - keys.prompt - offset, count = T + keys.prompt + keys.own + kPanel;
        const int64_t begin = clamp(-a.M - first, 0, count), end = clamp(a.M + 1 - first, begin, count);
        const float* table = a.bias + h * (2 * a.M + 1) + a.M;
        fill(bias, begin, table[-a.M]);
        memcpy(bias + begin, table + (first + begin), static_cast<size_t>(end - begin) * sizeof(float));
        fill(bias + end, count - end, table[a.M]);
    }

    // How many of the keys [chunk, chunk + width) a row of the block may attend to.
    int64_t allowed_in(int64_t row, int64_t chunk, int64_t width) const { return clamp(limit[row] - chunk, 0, width); }

    // Entry [index] of the result is for a key of that index and query i.
    const float* bias_of(int64_t i) const { return bias + (T - 1) - i; }

    // to[panel][d][key]: rows become columns.
    void pack_panels(bool values, float* to) const {
        float rows[kLanes * 256];
        for (int64_t n = 0; n < round_up(keys.count, kPanel); n += kLanes) {
            float* panel = to + n / kPanel * kPanel * a.K + n % kPanel;
            for (int64_t lane = 0; lane < kLanes; ++lane) {
                if (n + lane < keys.count) {
                    keys.load_key(a, b, h, keys.index[n + lane], values, dtype, rows + lane * a.K);
                } else {
                    clear(rows + lane * a.K, a.K);
                }
            }
            for (int64_t d = 0; d < a.K; d += kLanes) {
                transpose(rows + d, a.K, panel + d * kPanel, kPanel);
            }
        }
    }

    void pack_rows(bool values, float* to) const {
        for (int64_t n = 0; n < keys.count; ++n) {
            keys.load_key(a, b, h, keys.index[n], values, dtype, to + n * a.K);
        }
    }

    // Row i of this example in a contiguous tensor like q.
    int64_t row_offset(int64_t i) const { return ((a.query_begin(b) + i) * a.H + h) * a.K; }
    int64_t stats_offset(int64_t i) const { return h * a.N + a.query_begin(b) + i; }

    void load_queries(int64_t first, int64_t count) {
        for (int64_t i = 0; i < count; ++i) {
            load_row(a.q, a.own(a.q_strides, b, a.query_begin(b), first + i, h), dtype, q + i * a.K, a.K);
            limit[i] = keys.allowed(a, offset + first + i);
        }
    }

    // to[count][kScoreRow] = rows[count][K] times the panels of keys [chunk, chunk + width).
    void product(const float* rows, int64_t count, const float* panels, int64_t chunk, int64_t width, float* to) const {
        for (int64_t n = 0; n < width; n += kPanel) {
            const int64_t left = round_up(width - n, kLanes), columns = left < kPanel ? left : kPanel;
            multiply({rows, a.K, 1}, count, panels + (chunk + n) * a.K, kPanel, columns, to + n, kScoreRow, a.K, false);
        }
    }

    // Dropout's factors for query i, by index, for the keys [n, n + width).
    void draw(int64_t i, int64_t n, int64_t width) const {
        const int64_t first = keys.index[n], last = keys.index[n + round_up(width, kLanes) - 1];
        const uint32_t pair = static_cast<uint32_t>(b * a.H + h);
        dropout.factors((i << 35) + first, last - first + 1, factors + first, pair);
    }

    void forward(void* to, float* stats, int64_t part, int64_t parts);
    void forward_block(int64_t first, int64_t count);
    void weigh(int64_t i, int64_t row, int64_t chunk, int64_t width);
    void score_few(int64_t chunk, int64_t width, float* to);
    template <int64_t kColumns>
    void add_few(int64_t chunk, int64_t width, int64_t column);
    void forward_few(void* to, float* stats);
    void finish_rows(int64_t first, int64_t count, void* to, float* stats);
    void starved_forward(int64_t i, float* row) const;
    void backward(const void* dout_rows, const float* stats, void* dq_rows, void* dk_rows, void* dv_rows,
                  float* share_k, float* share_v);
    void backward_block(int64_t first, int64_t count);
    void weigh_again(int64_t i, int64_t row, int64_t chunk, int64_t width, float* s, float* dw);
    void differentiate(int64_t row, int64_t chunk, int64_t width, float* s, float* dw) const;
    bool is_silent(const void* dout_rows, const float* stats, int64_t i) const;
    void clear_queries(void* dq_rows, int64_t first, int64_t end) const;
    void load_gradients(const void* dout_rows, const float* stats, int64_t first, int64_t count);
    void starved_backward(int64_t i, int64_t row);
    void store_keys(void* dk_rows, void* dv_rows, float* share_k, float* share_v, bool starved) const;
};

// Turns a row of scores into weights by the online softmax: top and total are the row's so far, out is rescaled.
void Work::weigh(int64_t i, int64_t row, int64_t chunk, int64_t width) {
    float* s = scores + row * kScoreRow;
    const int64_t allowed = allowed_in(row, chunk, width);
    if (allowed == 0) return clear(s, round_up(width, kLanes));
    vfloat most = splat(-INFINITY);
    const float* bias_row = a.bias == nullptr ? nullptr : bias_of(i);
    for (int64_t n = 0; n < allowed; n += kLanes) {
        vfloat value = load(s + n);
        if (bias_row != nullptr) value += keys.at(bias_row, chunk + n);
        store(s + n, value);
        if (n + kLanes > allowed) {
            for (int64_t k = n; k < n + kLanes; ++k) s[k] = k < allowed ? s[k] : -INFINITY;
            value = load(s + n);
        }
        most = value > most ? value : most;
    }
    const float found = largest_lane(most), high = found > top[row] ? found : top[row];
    const float base = high == -INFINITY ? 0.0f : high;  // all scores so far are -inf: weights of 0, not NaN
    if (dropout.active()) draw(i, chunk, allowed);
    vfloat sum{};
    for (int64_t n = 0; n < allowed; n += kLanes) {
        vfloat weight = exp(load(s + n) - base);
        sum += weight;
        if (dropout.active()) weight = drop(weight, keys.at(factors, chunk + n));
        store(s + n, weight);
    }
    for (int64_t n = round_up(allowed, kLanes); n < width; n += kLanes) store(s + n, vfloat{});
    const float added = sum_lanes(sum);
    const vfloat rescale = exp(splat(top[row] - base));
    if (chunk > 0) {
        for (int64_t d = 0; d < a.K; d += kLanes) store(out + row * a.K + d, load(out + row * a.K + d) * rescale);
    }
    total[row] = chunk > 0 ? total[row] * rescale[0] + added : added;
    top[row] = high;
}

void Work::forward_block(int64_t first, int64_t count) {
    load_queries(first, count);
    clear(out, count * a.K);
    for (int64_t i = 0; i < count; ++i) top[i] = -INFINITY, total[i] = 0.0f;
    const int64_t most = limit[count - 1];  // limits do not fall from row to row
    for (int64_t chunk = 0; chunk < most; chunk += kKeys) {
        const int64_t width = most - chunk < kKeys ? most - chunk : kKeys;
        product(q, count, key_panels, chunk, width, scores);
        for (int64_t i = 0; i < count; ++i) weigh(first + i, i, chunk, width);
        multiply({scores, kScoreRow, 1}, count, value_rows + chunk * a.K, a.K, a.K, out, a.K, width);
    }
}

// A row that may attend to nothing takes the mean of the example's own values (there is no prompt then).
void Work::starved_forward(int64_t i, float* row) const {
    float value[256];
    clear(row, a.K);
    if (keys.own == 0) return;
    if (dropout.active()) {
        dropout.factors(i << 35, keys.own, factors, static_cast<uint32_t>(b * a.H + h));
    }
    for (int64_t s = 0; s < keys.own; ++s) {
        keys.load_key(a, b, h, s, true, dtype, value);
        const float factor = dropout.active() ? factors[s] : 1.0f;
        for (int64_t d = 0; d < a.K; ++d) row[d] += factor != 0.0f ? factor * value[d] : 0.0f;
    }
    for (int64_t d = 0; d < a.K; ++d) row[d] /= static_cast<float>(keys.own);
}

void Work::finish_rows(int64_t first, int64_t count, void* to, float* stats) {
    for (int64_t i = 0; i < count; ++i) {
        float* row = out + i * a.K;
        const bool starved = limit[i] == 0;
        if (starved) {
            starved_forward(first + i, row);
        } else {
            for (int64_t d = 0; d < a.K; d += kLanes) store(row + d, load(row + d) / total[i]);
        }
        store_row(row, to, row_offset(first + i), dtype, a.K);
        stats[stats_offset(first + i)] = starved ? 0.0f : top[i];
        stats[a.H * a.N + stats_offset(first + i)] = starved ? 0.0f : total[i];
    }
}

// The scores of a few queries: a product of each query with each key, which is read where it lies.
void Work::score_few(int64_t chunk, int64_t width, float* to) {
    with_type(dtype, [&](auto type) {
        for (int64_t n = 0; n < width; ++n) {
            const auto* row = keys.row<decltype(type)>(a, b, h, chunk + n, false);
            for (int64_t i = 0; i < T; ++i) {
                vfloat sum{};
                for (int64_t d = 0; d < a.K; d += kLanes) {
                    sum = fused_multiply_add(load(q + i * a.K + d), load(row + d), sum);
                }
                to[i * kScoreRow + n] = sum_lanes(sum);
            }
        }
    });
}

// Adds the values of a chunk, weighted, to kColumns columns of the outputs of a few queries, in registers.
template <int64_t kColumns>
void Work::add_few(int64_t chunk, int64_t width, int64_t column) {
    constexpr int64_t kVectors = kColumns / kLanes;
    with_type(dtype, [&](auto type) {
        for (int64_t i = 0; i < T; ++i) {
            vfloat sum[kVectors];
            for (int64_t d = 0; d < kVectors; ++d) sum[d] = load(out + i * a.K + column + d * kLanes);
            for (int64_t n = 0; n < width; ++n) {
                const auto* row = keys.row<decltype(type)>(a, b, h, chunk + n, true) + column;
                const vfloat weight = splat(scores[i * kScoreRow + n]);
                for (int64_t d = 0; d < kVectors; ++d) {
                    sum[d] = fused_multiply_add(weight, load(row + d * kLanes), sum[d]);
                }
            }
            for (int64_t d = 0; d < kVectors; ++d) store(out + i * a.K + column + d * kLanes, sum[d]);
        }
    });
}

// A few queries (decoding): keys and values are read where they lie.
void Work::forward_few(void* to, float* stats) {
    load_queries(0, T);
    clear(out, T * a.K);
    for (int64_t i = 0; i < T; ++i) top[i] = -INFINITY, total[i] = 0.0f;
    const int64_t most = limit[T - 1];
    for (int64_t chunk = 0; chunk < most; chunk += kKeys) {
        const int64_t width = most - chunk < kKeys ? most - chunk : kKeys;
        score_few(chunk, width, scores);
        for (int64_t i = 0; i < T; ++i) weigh(i, i, chunk, width);
        int64_t column = 0;
        for (; column + 64 <= a.K; column += 64) add_few<64>(chunk, width, column);
        for (; column < a.K; column += 16) add_few<16>(chunk, width, column);
    }
    finish_rows(0, T, to, stats);
}

// Blocks part, part + parts, ... of this example and head.
void Work::forward(void* to, float* stats, int64_t part, int64_t parts) {
    if (T <= kFewQueries) {
        if (part == 0 && T > 0) forward_few(to, stats);
        return;
    }
    pack_panels(false, key_panels);
    pack_rows(true, value_rows);
    for (int64_t first = part * kQueries; first < T; first += parts * kQueries) {
        const int64_t count = T - first < kQueries ? T - first : kQueries;
        forward_block(first, count);
        finish_rows(first, count, to, stats);
    }
}

// s [width] of row `row`: scores become weights, negative where dropped. dw: gradients of the weights, with dropout.
// Their product adds to delta, which is dout . out: so nobody has to keep out. A NaN may have either sign: times 0 or
// not, it stays one.
void Work::weigh_again(int64_t i, int64_t row, int64_t chunk, int64_t width, float* s, float* dw) {
    const int64_t allowed = allowed_in(row, chunk, width);
    const float* bias_row = a.bias == nullptr ? nullptr : bias_of(i);
    if (dropout.active() && allowed > 0) draw(i, chunk, allowed);
    const float inverse = 1.0f / total[row];
    vfloat sum{};
    for (int64_t n = 0; n < allowed; n += kLanes) {
        vfloat value = load(s + n);
        if (bias_row != nullptr) value += keys.at(bias_row, chunk + n);
        vfloat weight = exp(value - top[row]) * inverse, dweight = load(dw + n);
        if (n + kLanes > allowed) {
            for (int64_t lane = allowed - n; lane < kLanes; ++lane) weight[lane] = 0.0f, dweight[lane] = 0.0f;
        }
        vuint dropped{};
        if (dropout.active()) {
            const vfloat factor = keys.at(factors, chunk + n);
            dweight *= factor;  // of what is not finite NaN, also where it is dropped, as in PyTorch
            dropped = bit_cast<vuint>(factor == 0.0f) & kSign;
        }
        sum = fused_multiply_add(weight, dweight, sum);
        store(s + n, bit_cast<vfloat>(bit_cast<vuint>(weight) | dropped));
        store(dw + n, dweight);
    }
    delta[row] += sum_lanes(sum);
    for (int64_t n = round_up(allowed, kLanes); n < width; n += kLanes) {
        store(s + n, vfloat{});
        store(dw + n, vfloat{});
    }
}

// Of what weigh_again left, s becomes weights times dropout's factors, dw the gradient of the scores.
void Work::differentiate(int64_t row, int64_t chunk, int64_t width, float* s, float* dw) const {
    const int64_t allowed = allowed_in(row, chunk, width);
    for (int64_t n = 0; n < allowed; n += kLanes) {
        const vfloat found = load(s + n);
        vfloat weight = found;
        if (dropout.active()) {
            const vuint bits = bit_cast<vuint>(found);
            weight = bit_cast<vfloat>(bits & ~kSign);
            store(s + n, weight * ((bits & kSign) == 0u ? splat(dropout.scale()) : vfloat{}));
        }
        store(dw + n, weight * (load(dw + n) - delta[row]));
    }
}

void Work::backward_block(int64_t first, int64_t count) {
    const int64_t most = limit[count - 1];
    const auto each_chunk = [&](auto run) {
        for (int64_t chunk = 0; chunk < most; chunk += kKeys) {
            const int64_t block = chunk / kKeys * kQueries * kScoreRow;
            run(chunk, most - chunk < kKeys ? most - chunk : kKeys, scores + block, dweights + block);
        }
    };
    each_chunk([&](int64_t chunk, int64_t width, float* s, float* dw) {
        if (T <= kFewQueries) {
            score_few(chunk, width, s);  // as in the forward pass: a weight must not depend on the order of a sum
        } else {
            product(q, count, key_panels, chunk, width, s);
        }
        product(dout, count, value_panels, chunk, width, dw);
        for (int64_t i = 0; i < count; ++i) {
            weigh_again(first + i, i, chunk, width, s + i * kScoreRow, dw + i * kScoreRow);
        }
    });
    each_chunk([&](int64_t chunk, int64_t width, float* s, float* dw) {
        for (int64_t i = 0; i < count; ++i) differentiate(i, chunk, width, s + i * kScoreRow, dw + i * kScoreRow);
        multiply({s, 1, kScoreRow}, width, dout, a.K, a.K, dvalues + chunk * a.K, a.K, count);
        multiply({dw, 1, kScoreRow}, width, q, a.K, a.K, dkeys + chunk * a.K, a.K, count);
        multiply({dw, kScoreRow, 1}, count, key_rows + chunk * a.K, a.K, a.K, dq, a.K, width);
    });
}

// The gradient of a row that took the mean of all own values.
void Work::starved_backward(int64_t i, int64_t row) {
    float key[256], value[256], *dweights_of_row = dweights;  // whose rows have had their turn
    const float *row_q = q + row * a.K, *row_dout = dout + row * a.K;
    float* row_dq = dq + row * a.K;
    if (dropout.active()) {
        dropout.factors(i << 35, keys.own, factors, static_cast<uint32_t>(b * a.H + h));
    }
    const float weight = 1.0f / static_cast<float>(keys.own);
    for (int64_t s = 0; s < keys.own; ++s) {
        keys.load_key(a, b, h, s, true, dtype, value);
        const float factor = dropout.active() ? factors[s] : 1.0f;
        float dweight = 0.0f;
        for (int64_t d = 0; d < a.K; ++d) dweight += row_dout[d] * value[d];
        dweights_of_row[s] = factor * dweight;
        delta[row] += weight * dweights_of_row[s];
    }
    for (int64_t s = 0; s < keys.own; ++s) {
        keys.load_key(a, b, h, s, false, dtype, key);
        const float factor = dropout.active() ? factors[s] : 1.0f;
        const float dscore = weight * (dweights_of_row[s] - delta[row]);
        for (int64_t d = 0; d < a.K; ++d) {
            row_dq[d] += dscore * key[d];
            starved_dk[s * a.K + d] += dscore * row_q[d];
            starved_dv[s * a.K + d] += weight * factor * row_dout[d];
        }
    }
}

// Is the gradient of the output of query i zero, as it is where the model's padding is? Such a query adds nothing.
bool Work::is_silent(const void* dout_rows, const float* stats, int64_t i) const {
    float row[256];
    load_row(dout_rows, row_offset(i), dtype, row, a.K);
    vfloat size{};
    for (int64_t d = 0; d < a.K; d += kLanes) size += load(row + d) < 0.0f ? -load(row + d) : load(row + d);
    const float most = stats[stats_offset(i)], sum = stats[a.H * a.N + stats_offset(i)];
    const bool finite = std::isfinite(most) && std::isfinite(sum);  // NaN and infinity among scores must spread
    return sum_lanes(size) == 0.0f && (finite || keys.allowed(a, offset + i) == 0);
}

void Work::clear_queries(void* dq_rows, int64_t first, int64_t end) const {
    const float zeros[256] = {};
    for (int64_t i = first; i < end; ++i) store_row(zeros, dq_rows, row_offset(i), dtype, a.K);
}

// Loads a block of queries and the gradients of their outputs; delta is still to be summed.
void Work::load_gradients(const void* dout_rows, const float* stats, int64_t first, int64_t count) {
    load_queries(first, count);
    for (int64_t i = 0; i < count; ++i) {
        load_row(dout_rows, row_offset(first + i), dtype, dout + i * a.K, a.K);
        delta[i] = 0.0f;
        top[i] = stats[stats_offset(first + i)];
        total[i] = stats[a.H * a.N + stats_offset(first + i)];
    }
}

// Gradients of keys and values to where these came from; zero for keys that nothing may attend to.
void Work::store_keys(void* dk_rows, void* dv_rows, float* share_k, float* share_v, bool starved) const {
    const float zeros[256] = {};
    for (int64_t p = 0; p < a.P; ++p) {
        const int64_t to = ((b * a.P + p) * a.H + h) * a.K;
        store_row(p < keys.prompt ? dkeys + p * a.K : zeros, share_k, to, fp::kFloat32, a.K);
        store_row(p < keys.prompt ? dvalues + p * a.K : zeros, share_v, to, fp::kFloat32, a.K);
    }
    int64_t n = keys.prompt;
    for (int64_t s = 0; s < keys.own; ++s) {
        const bool allowed = n < keys.count && keys.index[n] == keys.prompt + s;
        float *key = dkeys + n * a.K, *value = dvalues + n * a.K;
        const float *from_k = allowed ? key : zeros, *from_v = allowed ? value : zeros;
        if (starved) {
            float *sum_k = starved_dk + s * a.K, *sum_v = starved_dv + s * a.K;
            for (int64_t d = 0; d < a.K; ++d) sum_k[d] += from_k[d], sum_v[d] += from_v[d];
            from_k = sum_k, from_v = sum_v;
        }
        const int64_t to = ((a.key_begin(b) + s) * a.H + h) * a.K;
        store_row(from_k, dk_rows, to, dtype, a.K);
        store_row(from_v, dv_rows, to, dtype, a.K);
        n += allowed ? 1 : 0;
    }
}

void Work::backward(const void* dout_rows, const float* stats, void* dq_rows, void* dk_rows, void* dv_rows,
                    float* share_k, float* share_v) {
    pack_panels(false, key_panels);
    pack_panels(true, value_panels);
    pack_rows(false, key_rows);
    clear(dkeys, keys.count * a.K);
    clear(dvalues, keys.count * a.K);
    int64_t begin = 0, end = T;
    while (begin < end && is_silent(dout_rows, stats, begin)) ++begin;
    while (begin < end && is_silent(dout_rows, stats, end - 1)) --end;
    if (T <= kFewQueries) begin = 0, end = T;
    clear_queries(dq_rows, 0, begin);
    clear_queries(dq_rows, end, T);
    bool starved = false;
    for (int64_t first = begin; first < end; first += kQueries) {
        const int64_t count = end - first < kQueries ? end - first : kQueries;
        clear(dq, count * a.K);
        load_gradients(dout_rows, stats, first, count);
        backward_block(first, count);
        for (int64_t i = 0; i < count; ++i) {
            if (limit[i] > 0 || keys.own == 0) continue;
            if (!starved) {
                clear(starved_dk, keys.own * a.K);
                clear(starved_dv, keys.own * a.K);
                starved = true;
            }
            starved_backward(first + i, i);
        }
        for (int64_t i = 0; i < count; ++i) store_row(dq + i * a.K, dq_rows, row_offset(first + i), dtype, a.K);
    }
    store_keys(dk_rows, dv_rows, share_k, share_v, starved);
}

// Calls run(work, task, part, parts) for every example and head, cut into parts where there are too few for all
// threads.
template <class Run>
int64_t each_head(const fp::Attention& a, const int64_t* seed, double dropout_p, int64_t dtype, bool backward,
                  const Run& run) {
    if (!is_dtype(dtype)) return kBadDType;
    const WeightDropout dropout(seed, dropout_p);
    const Limits most = limits(a);
    const int64_t tasks = a.B * a.H, blocks = round_up(most.queries, kQueries) / kQueries;
    const int64_t threads = omp_get_max_threads();
    const int64_t wanted = tasks > 0 && !backward ? 2 * threads / tasks : 1;
    const int64_t limited = wanted < blocks ? wanted : blocks, parts = limited > 1 ? limited : 1;
    int64_t failed = 0;
#pragma omp parallel reduction(+ : failed) if (a.N * a.H * a.K >= kParallelElements || most.keys >= kKeys)
    {
        Work work(a, dropout, dtype);
        Arena measure(nullptr);
        work.cut(measure, most, backward);
        auto* memory = static_cast<char*>(allocate_lines(measure.used()));
        failed += memory == nullptr ? 1 : 0;
        Arena arena(memory);
        work.cut(arena, most, backward);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < tasks * parts; ++task) {
            if (memory == nullptr) continue;
            work.begin(task / parts);
            run(work, task % parts, parts);
        }
        free(memory);
    }
    return failed > 0 ? kNoMemory : 0;
}

int64_t t5_attention(const void* q, const void* k, const void* v, const float* bias, const void* prompt_k,
                     const void* prompt_v, const int64_t* prompt_ids, const int64_t* prompt_lens,
                     const uint8_t* key_mask, const int64_t* offsets, const int64_t* cu_q, const int64_t* cu_k,
                     const int64_t* sizes, const int64_t* seed, void* out, float* stats, int64_t offset, int64_t causal,
                     double dropout_p, int64_t dtype, void* /*stream*/) {
    const fp::Attention a = attention(q, k, v, bias, prompt_k, prompt_v, prompt_ids, prompt_lens, key_mask, offsets,
                                      cu_q, cu_k, sizes, offset, causal);
    return each_head(a, seed, dropout_p, dtype, false,
                     [&](Work& work, int64_t part, int64_t parts) { work.forward(out, stats, part, parts); });
}

int64_t t5_attention_backward(const void* dout, const float* stats, const void* q, const void* k, const void* v,
                              const float* bias, const void* prompt_k, const void* prompt_v, const int64_t* prompt_ids,
                              const int64_t* prompt_lens, const uint8_t* key_mask, const int64_t* offsets,
                              const int64_t* cu_q, const int64_t* cu_k, const int64_t* sizes, const int64_t* seed,
                              void* dq, void* dk, void* dv, float* share_k, float* share_v, int64_t offset,
                              int64_t causal, double dropout_p, int64_t dtype, void* /*stream*/) {
    const fp::Attention a = attention(q, k, v, bias, prompt_k, prompt_v, prompt_ids, prompt_lens, key_mask, offsets,
                                      cu_q, cu_k, sizes, offset, causal);
    return each_head(a, seed, dropout_p, dtype, true, [&](Work& work, int64_t /*part*/, int64_t /*parts*/) {
        work.backward(dout, stats, dq, dk, dv, share_k, share_v);
    });
}

// total[r] = the sum over b, ascending, of share[b] where example b reads prompt r.
int64_t t5_attention_prompt_sum(const float* share, const int64_t* prompt_ids, void* total, int64_t B, int64_t R,
                                int64_t row_elements, int64_t dtype, void* /*stream*/) {
    if (!is_dtype(dtype)) return kBadDType;
    constexpr int64_t kColumns = 256;
    const int64_t parts = (row_elements + kColumns - 1) / kColumns;
#pragma omp parallel for schedule(static) if (B * row_elements >= kParallelElements)
    for (int64_t task = 0; task < R * parts; ++task) {
        const int64_t r = task / parts, first = task % parts * kColumns;
        const int64_t count = row_elements - first < kColumns ? row_elements - first : kColumns;
        float sum[kColumns] = {};
        for (int64_t b = 0; b < B; ++b) {
            if ((prompt_ids == nullptr ? 0 : prompt_ids[b]) != r) continue;
            const float* row = share + b * row_elements + first;
            each_vector(count,
                        [&](int64_t d, auto extent) { store(sum + d, load(sum + d) + load_at(row, d, extent)); });
        }
        with_type(dtype, [&](auto type) {
            auto* to = static_cast<decltype(type)*>(total) + r * row_elements + first;
            each_vector(count, [&](int64_t d, auto extent) { store_at(to, d, extent, load(sum + d)); });
        });
    }
    return 0;
}

FP_KERNEL(t5_attention);
FP_KERNEL(t5_attention_backward);
FP_KERNEL(t5_attention_prompt_sum);

}  // namespace

// SPDX-License-Identifier: Apache-2.0
// What t5_attention's forward and backward pass on a CPU share: one example and head at a time, in blocks of queries
// and chunks of keys that stay in the caches. Shapes and formulas: fastprompt/ops/t5_attention.py. Everything is fp32
// between loads and stores but the factors of PairProducts.
//
// Keys that are not allowed are left out when an example's keys are gathered, so they cost nothing.
#pragma once
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "common/attention.h"
#include "common/dtype.h"
#include "common/integers.h"
#include "common/kernel.h"
#include "cpu/dropout.h"
#include "cpu/lanes.h"
#include "cpu/memory.h"
#include "cpu/simd.h"
#include "cpu/t5_attention_products.h"
#include "cpu/t5_attention_rows.h"
#if defined(FP_HAS_PAIRS)
#include "cpu/t5_attention_pairs.h"
#endif

namespace {

#if defined(FP_HAS_PAIRS)
using Products = PairProducts;
#else
using Products = FloatProducts;
#endif

constexpr int64_t kQueries = Products::kQueries;        // of a block
constexpr int64_t kFewQueries = Products::kFewQueries;  // up to so many, keys and values are read where they lie

// visit(i) for rows [0, count), each of which ask(i) has asked for before.
template <class Ask, class Visit>
FP_INLINE void each_row_ahead(int64_t count, const Ask& ask, const Visit& visit) {
    for (int64_t i = -kRowsAhead; i < count; ++i) {
        if (i + kRowsAhead < count) ask(i + kRowsAhead);
        if (i >= 0) visit(i);
    }
}

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

// to[count][K] = the rows that begin at offset(i).
template <class Offset>
void load_rows(const void* from, const Offset& offset, int64_t dtype, float* to, int64_t count, int64_t K) {
    each_row_ahead(
        count, [&](int64_t i) { fetch_row(from, offset(i), dtype, K); },
        [&](int64_t i) { load_row(from, offset(i), dtype, to + i * K, K); });
}

// The inverse of load_rows.
template <class Offset>
void store_rows(const float* from, void* to, const Offset& offset, int64_t dtype, int64_t count, int64_t K) {
    each_row_ahead(
        count, [&](int64_t i) { fetch_row(to, offset(i), dtype, K); },
        [&](int64_t i) { store_row(from + i * K, to, offset(i), dtype, K); });
}

// May write up to kLanes - 1 more.
void fill(float* to, int64_t count, float value) {
    for (int64_t d = 0; d < count; d += kLanes) store(to + d, splat(value));
}

// Does what index tensors hold stay inside the others? The launcher has compared shapes alone where it must not look.
bool in_range(const fp::Attention& a) {
    constexpr int64_t kMaxOffset = int64_t{1} << 30;
    if (a.packed != 0 && !(covering(a.cu_q, a.B, a.N) && covering(a.cu_k, a.B, a.Nk))) return false;
    for (int64_t b = 0; b < a.B; ++b) {
        if (a.query_offset(b) < 0 || a.query_offset(b) >= kMaxOffset) return false;
        if (a.prompt_k == nullptr) continue;
        if (a.prompt(b) < 0 || a.prompt(b) >= a.R) return false;
        if (a.prompt_keys(b) < 0 || a.prompt_keys(b) > a.P) return false;
    }
    return true;
}

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
        const int64_t end = a.causal == 0 ? own : clamp(a.query_offset(b) + a.queries(b), 0, own);
        for (int64_t s = 0; s < end; ++s) {
            if (mask == nullptr || mask[s] != 0) index[count++] = static_cast<int32_t>(prompt + s);
        }
        for (int64_t pad = 0; pad < kPanel; ++pad) index[count + pad] = static_cast<int32_t>(prompt + own + pad);
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
        return index[n + kLanes - 1] - first == kLanes - 1 ? load(table + first) : scattered(table, n);
    }

    // Seldom needed, so its code is kept out of the loops over keys.
    __attribute__((noinline)) vfloat scattered(const float* table, int64_t n) const {
        vfloat value;
        for (int64_t lane = 0; lane < kLanes; ++lane) value[lane] = table[index[n + lane]];
        return value;
    }
};

// Of a row of which only `allowed` weights of `width` are written, the others.
template <class Weight>
FP_INLINE void clear_weights(Weight* row, int64_t allowed, int64_t width) {
    for (int64_t n = round_up(allowed, kLanes); n < round_up(width, Products::kWeights); n += kLanes) {
        store_weight(row + n, vfloat{});
    }
}

// A sum over a row, whose chains are short with one lane, too.
struct RowTotal {
    vfloat part = {};

    FP_INLINE void end_vector(int64_t n) {
        if (kLanes == 1 && n % 16 == 15) sum_ += part, part = vfloat{};
    }
    FP_INLINE float total() const { return sum_lanes(kLanes == 1 ? sum_ + part : part); }

private:
    vfloat sum_ = {};
};

// One example and head, as both passes see it.
struct Work {
    using Factor = Products::Factor;

    Work(const fp::Attention& a, const Dropout& dropout, int64_t dtype) : a(a), dropout(dropout), dtype(dtype) {}

    const fp::Attention& a;
    const Dropout& dropout;
    const int64_t dtype;
    Keys keys = {};
    int64_t b = -1, h = 0, T = 0, offset = 0;  // no example yet
    float* bias = nullptr;                     // by index - query + T - 1
    float* factors = nullptr;                  // [P + S]: dropout's, of one row
    Factor* key_panels = nullptr;              // [panels][K][kPanel]
    float* q = nullptr;                        // [kQueries][K]
    Products::Queries q_factor;
    float* scores = nullptr;                 // [chunks][kQueries][kScoreRow]; weights take their place
    float *top = nullptr, *total = nullptr;  // [kQueries]
    int64_t* limit = nullptr;                // [kQueries]: keys that a row may attend to
    Rows few_keys, few_values;               // what few queries read

    // Keys of an example in whole panels, and one more.
    static int64_t panelled(const Limits& most) { return round_up(most.keys, kPanel) + kPanel; }

    void cut(Arena& arena, const Limits& most, int64_t chunks) {
        const int64_t keys_up = panelled(most);
        keys.index = arena.take<int32_t>(keys_up + kPanel);
        bias = arena.take<float>(most.span + 2 * kPanel);
        factors = arena.take<float>(keys_up);
        key_panels = arena.take<Factor>(keys_up * Products::depth(a.K));
        q = arena.take<float>(kQueries * a.K);
        q_factor.cut(arena, a.K);
        scores = arena.take<float>(chunks * kQueries * kScoreRow);
        top = arena.take<float>(kQueries);
        total = arena.take<float>(kQueries);
        limit = arena.take<int64_t>(kQueries);
        few_keys.cut(arena, keys_up);
        few_values.cut(arena, keys_up);
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

    // Where key i of the example, or its value, lies.
    const void* key_row(int64_t i, bool values) const {
        const auto row = [&](const void* rows, int64_t at) {
            return static_cast<const char*>(rows) + at * size_of(dtype);
        };
        if (i < keys.prompt) {
            const fp::Strides& s = values ? a.prompt_v_strides : a.prompt_k_strides;
            return row(values ? a.prompt_v : a.prompt_k, a.prompt(b) * s.example + i * s.row + h * s.head);
        }
        const fp::Strides& s = values ? a.v_strides : a.k_strides;
        return row(values ? a.v : a.k, a.own(s, b, a.key_begin(b), i - keys.prompt, h));
    }
    void load_key(int64_t i, bool values, float* to) const { load_row(key_row(i, values), 0, dtype, to, a.K); }
    void load_key(int64_t i, bool values, fp::bf16* to) const {
        const auto* row = static_cast<const fp::bf16*>(key_row(i, values));
        for (int64_t d = 0; d < a.K; d += kLanes) memcpy(to + d, row + d, kLanes * sizeof(fp::bf16));
    }

    // Loads the n-th of the gathered keys or values as a factor, and asks for a later one.
    auto gathered(bool values) const {
        return [this, values](int64_t n, Factor* to) {
            const int64_t later = n + kRowsAhead;
            if (later < keys.count) fetch_row(key_row(keys.index[later], values), 0, dtype, a.K);
            load_key(keys.index[n], values, to);
        };
    }

    // Looks up what a few queries read.
    void find_rows() {
        const auto find = [&](Rows& rows, bool values) {
            const auto spaced = [&](const fp::Strides& s, int64_t first) {
                return Spaced{key_row(first, values), s.row * size_of(dtype)};
            };
            const Spaced own = spaced(values ? a.v_strides : a.k_strides, keys.prompt);
            const Spaced prompt = keys.prompt > 0 ? spaced(values ? a.prompt_v_strides : a.prompt_k_strides, 0) : own;
            rows.find(keys.index, keys.count, keys.prompt, prompt, own, a.K, dtype);
        };
        find(few_keys, false);
        find(few_values, true);
    }

    // Row i of this example in a contiguous tensor like q.
    int64_t row_offset(int64_t i) const { return ((a.query_begin(b) + i) * a.H + h) * a.K; }
    auto rows_from(int64_t first) const {
        return [this, first](int64_t i) { return row_offset(first + i); };
    }
    int64_t stats_offset(int64_t i) const { return h * a.N + a.query_begin(b) + i; }

    void load_queries(int64_t first, int64_t count) {
        const auto row = [&](int64_t i) { return a.own(a.q_strides, b, a.query_begin(b), first + i, h); };
        load_rows(a.q, row, dtype, q, count, a.K);
        for (int64_t i = 0; i < count; ++i) limit[i] = keys.allowed(a, offset + first + i);
    }

    // Dropout's factors for query i, by index, for the keys [n, n + width).
    void draw(int64_t i, int64_t n, int64_t width) const {
        const int64_t first = keys.index[n], last = keys.index[n + round_up(width, kLanes) - 1];
        const uint32_t pair = static_cast<uint32_t>(b * a.H + h);
        dropout.factors((i << 35) + first, last - first + 1, factors + first, pair);
    }
};

// Calls run(pass, part, parts) for every example and head, cut into parts where a pass allows that and there are too
// few for all threads. A Pass is a Work that cuts its own memory.
template <class Pass, class Run>
int64_t each_head(const fp::Attention& a, const int64_t* seed, double dropout_p, int64_t dtype, const Run& run) {
    if (!Products::serves(dtype)) return fp::kBadOption;
    if (!in_range(a)) return fp::kBadRange;
    const Dropout dropout(seed, dropout_p);
    const Limits most = limits(a);
    const int64_t tasks = a.B * a.H, blocks = round_up(most.queries, kQueries) / kQueries;
    const int64_t threads = omp_get_max_threads();
    const int64_t wanted = tasks > 0 && Pass::kHasParts ? 2 * threads / tasks : 1;
    const int64_t limited = wanted < blocks ? wanted : blocks, parts = limited > 1 ? limited : 1;
    int64_t failed = 0;
#pragma omp parallel reduction(+ : failed) if (a.N * a.H * a.K >= kParallelElements || most.keys >= kKeys)
    {
        Pass pass(a, dropout, dtype);
        Arena measure(nullptr);
        pass.cut(measure, most);
        auto* memory = static_cast<char*>(allocate_lines(measure.used()));
        failed += memory == nullptr ? 1 : 0;
        Arena arena(memory);
        pass.cut(arena, most);
        [[maybe_unused]] Products::Unit unit;
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < tasks * parts; ++task) {
            if (memory == nullptr) continue;
            pass.begin(task / parts);
            run(pass, task % parts, parts);
        }
        free(memory);
    }
    return failed > 0 ? fp::kNoMemory : 0;
}

}  // namespace

// SPDX-License-Identifier: Apache-2.0
// prompt_embed on the CPU: each output row is written once, straight from its source.
// Layout, shapes and dtypes: fastprompt/ops/prompt_embed.py.
#include <string.h>

#include "common/dtype.h"
#include "common/integers.h"
#include "common/kernel.h"
#include "cpu/dropout.h"
#include "cpu/memory.h"
#include "cpu/simd.h"

namespace {

constexpr int64_t kRowsPerTask = 16;
constexpr int64_t kRowsAhead = 4;
constexpr int64_t kRowsPerSum = 64;
constexpr int64_t kColumnsAhead = 128;

// Where the rows of each sequence come from and go to. Null arrays stand for the regular case.
struct Layout {
    const int64_t *starts, *lens, *cu_tokens, *cu_rows;
    int64_t B, S, L, R;  // S: tokens per sequence (padded) or in all (packed); L: likewise rows

    int64_t start(int64_t b) const { return starts == nullptr ? 0 : starts[b]; }
    int64_t length(int64_t b) const { return lens == nullptr ? R : lens[b]; }
    int64_t token_begin(int64_t b) const { return cu_tokens == nullptr ? b * S : cu_tokens[b]; }
    int64_t row_begin(int64_t b) const { return cu_rows == nullptr ? b * L : cu_rows[b]; }
    int64_t tokens(int64_t b) const { return token_begin(b + 1) - token_begin(b); }
    int64_t rows(int64_t b) const { return row_begin(b + 1) - row_begin(b); }
    int64_t all_rows() const { return cu_rows == nullptr ? B * L : L; }

    // Is row r of the prompts in sequence b, or in any?
    bool is_read(int64_t r, int64_t b) const { return r >= start(b) && r - start(b) < length(b); }
    bool is_read(int64_t r) const {
        for (int64_t b = 0; b < B; ++b) {
            if (is_read(r, b)) return true;
        }
        return false;
    }

    // The sequence that row r belongs to.
    int64_t sequence(int64_t r) const {
        if (cu_rows == nullptr) return r / L;
        int64_t low = 0, high = B;
        while (high - low > 1) {
            const int64_t middle = low + (high - low) / 2;
            (cu_rows[middle] <= r ? low : high) = middle;
        }
        return low;
    }

    // Every access that follows from this layout stays inside its tensor.
    bool prompts_valid() const {
        for (int64_t b = 0; b < B; ++b) {
            if (start(b) < 0 || length(b) < 0 || start(b) > R || length(b) > R - start(b)) return false;
        }
        return true;
    }
    bool rows_valid() const {
        if (cu_rows != nullptr && !covering(cu_rows, B, L)) return false;
        for (int64_t b = 0; b < B; ++b) {
            if (rows(b) < length(b)) return false;
        }
        return true;
    }
    bool tokens_valid() const {
        if (cu_tokens != nullptr && !rising(cu_tokens, B, S)) return false;
        for (int64_t b = 0; b < B; ++b) {
            if (tokens(b) > rows(b) - length(b)) return false;
        }
        return true;
    }
};

// Where a row of the output comes from: a row of the prompts or of the vocabulary table; null for zeros.
struct Source {
    const void* row;
    bool prompt;
};

struct Input {
    const void *ids, *weight, *prompts;
    int64_t V, weight_row, prompt_row;  // the vocabulary; bytes in a row of each
    bool ids_are_int64;

    // Row r of the output, in sequence b. Lowers `first_bad` to the flat index of a token id outside the vocabulary.
    Source source(const Layout& layout, int64_t b, int64_t r, int64_t* first_bad) const {
        const int64_t l = r - layout.row_begin(b), token = l - layout.length(b);
        if (token < 0) return {static_cast<const char*>(prompts) + (layout.start(b) + l) * prompt_row, true};
        if (token >= layout.tokens(b)) return {nullptr, false};
        const int64_t index = layout.token_begin(b) + token;
        const int64_t id =
            ids_are_int64 ? static_cast<const int64_t*>(ids)[index] : static_cast<const int32_t*>(ids)[index];
        if (id >= 0 && id < V) return {static_cast<const char*>(weight) + id * weight_row, false};
        if (index < *first_bad) *first_bad = index;
        return {nullptr, false};
    }
};

// Copies a row while fetching the next one: table rows lie anywhere, where no hardware prefetcher looks for them.
template <bool kStreaming>
void copy_row(const void* from, void* to, int64_t bytes, const void* next) {
    const char *source = static_cast<const char*>(from), *ahead = static_cast<const char*>(next);
    char* target = static_cast<char*>(to);
    int64_t i = 0;
    for (; i + kLine <= bytes; i += kLine) {
        __builtin_prefetch(ahead + i);
        if constexpr (!kStreaming) fetch(target + i + kStoreAhead);
        for (int64_t part = i; part < i + kLine; part += static_cast<int64_t>(sizeof(vfloat))) {
            vfloat value;
            memcpy(&value, source + part, sizeof(value));
            if constexpr (kStreaming) {
                stream(target + part, value);
            } else {
                memcpy(target + part, &value, sizeof(value));
            }
        }
    }
    memcpy(target + i, source + i, static_cast<size_t>(bytes - i));
}

template <class P, class W>
void convert_row(const P* from, W* to, int64_t D) {
    each_vector(D, [&](int64_t d, auto extent) { store_at(to, d, extent, load_at(from, d, extent)); });
}

void convert_row(int64_t from_dtype, const void* from, int64_t to_dtype, void* to, int64_t D) {
    with_type(from_dtype, [&](auto from_type) {
        with_type(to_dtype, [&](auto to_type) {
            convert_row(static_cast<const decltype(from_type)*>(from), static_cast<decltype(to_type)*>(to), D);
        });
    });
}

template <class W>
void drop_row(const float* factors, W* row, int64_t D) {
    each_vector(D, [&](int64_t d, auto extent) {
        store_at(row, d, extent, drop(load_at(row, d, extent), load_at(factors, d, extent)));
    });
}

void drop(const Dropout& dropout, int64_t first, int64_t dtype, void* row, int64_t D) {
    float factors[kChunk] = {};
    with_type(dtype, [&](auto type) {
        each_chunk(D, [&](int64_t begin, int64_t count) {
            dropout.factors(first + begin, count, factors);
            drop_row(factors, static_cast<decltype(type)*>(row) + begin, count);
        });
    });
}

// Returns 0, 1 + the flat index of the first bad token id, or a negative code. `error` is for GPUs.
int64_t prompt_embed(const void* ids, const void* weight, const void* prompts, const int64_t* starts,
                     const int64_t* lens, const int64_t* cu_tokens, const int64_t* cu_rows, const int64_t* seed,
                     void* out, int64_t* /*error*/, int64_t B, int64_t S, int64_t L, int64_t R, int64_t V, int64_t D,
                     double dropout_p, int64_t ids_are_int64, int64_t prompt_dtype, int64_t dtype, void* /*stream*/) {
    const Layout layout{starts, lens, cu_tokens, cu_rows, B, S, L, R};
    if (!is_dtype(dtype) || !is_dtype(prompt_dtype)) return fp::kBadOption;
    if (!layout.prompts_valid() || !layout.rows_valid() || !layout.tokens_valid()) return fp::kBadRange;
    const Dropout dropout(seed, dropout_p);
    const int64_t bytes = D * size_of(dtype), total = layout.all_rows();
    const Input input{ids, weight, prompts, V, bytes, D * size_of(prompt_dtype), ids_are_int64 != 0};
    const bool streaming = !dropout.active() && streams(out, bytes, total);
    const int64_t tasks = (total + kRowsPerTask - 1) / kRowsPerTask;
    int64_t first_bad = INT64_MAX;
#pragma omp parallel if (total * D >= kParallelElements) reduction(min : first_bad)
    {
#pragma omp for schedule(static)
        for (int64_t task = 0; task < tasks; ++task) {
            const int64_t first = task * kRowsPerTask, left = total - first;
            Source sources[kRowsPerTask + kRowsAhead];
            int64_t b = layout.sequence(first);
            for (int64_t i = 0; i < kRowsPerTask + kRowsAhead; ++i) {
                while (i < left && first + i >= layout.row_begin(b + 1)) ++b;
                sources[i] = i < left ? input.source(layout, b, first + i, &first_bad) : Source{nullptr, false};
            }
            for (int64_t i = 0; i < kRowsPerTask && i < left; ++i) {
                const Source source = sources[i];
                void* row = static_cast<char*>(out) + (first + i) * bytes;
                if (source.row == nullptr) {
                    memset(row, 0, static_cast<size_t>(bytes));
                    continue;
                }
                if (const char* later = static_cast<const char*>(sources[i + kRowsAhead].row)) {
                    __builtin_prefetch(later);  // for the page's address: a table is larger than the TLB's reach
                    __builtin_prefetch(later + bytes - 1);
                }
                if (source.prompt && prompt_dtype != dtype) {
                    convert_row(prompt_dtype, source.row, dtype, row, D);
                } else {
                    const void* next = sources[i + 1].row != nullptr ? sources[i + 1].row : source.row;
                    streaming ? copy_row<true>(source.row, row, bytes, next)
                              : copy_row<false>(source.row, row, bytes, next);
                }
                if (dropout.active()) drop(dropout, (first + i) * D, dtype, row, D);
            }
        }
        stream_fence();
    }
    return first_bad == INT64_MAX ? 0 : first_bad + 1;
}

// A prompt row's gradient as far as it has been added up: by Kahan's compensated sum, of which `lost` is what rounding
// took so far. Both are read but for the first rows, and `lost` is written but for the last.
struct Sums {
    float *total, *lost;
    bool first, last;
};

// Adds columns [d, d + kVectors * kLanes) of the rows that begin at `rows`. -ffp-contract=off keeps the sum exact. It
// stays in registers over all rows, but for that of AVX2 with dropout, which is twice as long.
template <bool kDrop, int kVectors, class T, class Extent>
FP_INLINE void add_columns(const T* dout, const int64_t* rows, int64_t count, const Dropout& dropout, int64_t d,
                           Extent extent, const Sums& sums) {
    constexpr int kVectorsPerLine = kLine / (kLanes * static_cast<int64_t>(sizeof(T)));
    vfloat sum[kVectors], low[kVectors];
    for (int v = 0; v < kVectors; ++v) {
        sum[v] = sums.first ? vfloat{} : load_at(sums.total, d + v * kLanes, extent);
        low[v] = sums.first ? vfloat{} : load_at(sums.lost, d + v * kLanes, extent);
    }
    for (int64_t i = 0; i < count; ++i) {
        float factors[kVectors * kLanes] = {};
        if constexpr (kDrop) dropout.factors(rows[i] + d, kVectors * kLanes, factors);
        for (int v = 0; v < kVectors; ++v) {
            // Past the row's end lies the next prompt row of the same sequence.
            if (v % kVectorsPerLine == 0) fetch(dout + rows[i] + d + kColumnsAhead + v * kLanes);
            vfloat value = load_at(dout + rows[i], d + v * kLanes, extent);
            if constexpr (kDrop) value = drop(value, load(factors + v * kLanes));
            const vfloat addend = value - low[v];
            const vfloat grown = sum[v] + addend;
            low[v] = (grown - sum[v]) - addend;
            sum[v] = grown;
        }
    }
    for (int v = 0; v < kVectors; ++v) {
        store_at(sums.total, d + v * kLanes, extent, sum[v], Put::kPlain);
        if (!sums.last) store_at(sums.lost, d + v * kLanes, extent, low[v], Put::kPlain);
    }
}

template <bool kDrop, class T>
void add_rows(const T* dout, const int64_t* rows, int64_t count, const Dropout& dropout, const Sums& sums, int64_t D) {
    constexpr int64_t kColumns = kDrop ? Dropout::kDrawn : FP_LANES == 16 ? 64 : 32;
    constexpr int kVectors = kColumns / FP_LANES;
    int64_t d = 0;
    for (; d + kColumns <= D; d += kColumns) add_columns<kDrop, kVectors>(dout, rows, count, dropout, d, Whole{}, sums);
    for (; d + kLanes <= D; d += kLanes) add_columns<kDrop, 1>(dout, rows, count, dropout, d, Whole{}, sums);
    if (d < D) add_columns<kDrop, 1>(dout, rows, count, dropout, d, Part{D - d}, sums);
}

// dprompts[r] = sum over b of the row of dout that copied prompt row r, b ascending: one order, hence one result.
int64_t prompt_embed_backward(const void* dout, const int64_t* starts, const int64_t* lens, const int64_t* cu_rows,
                              const int64_t* seed, void* dprompts, int64_t B, int64_t L, int64_t R, int64_t D,
                              double dropout_p, int64_t dtype, int64_t prompt_dtype, void* /*stream*/) {
    const Layout layout{starts, lens, nullptr, cu_rows, B, 0, L, R};
    if (!is_dtype(dtype) || !is_dtype(prompt_dtype)) return fp::kBadOption;
    if (!layout.prompts_valid() || !layout.rows_valid()) return fp::kBadRange;
    const Dropout dropout(seed, dropout_p);
#pragma omp parallel for schedule(static) if (B * R * D >= kParallelElements)
    for (int64_t r = 0; r < R; ++r) {
        if (!layout.is_read(r)) {  // as most rows of a bank
            const int64_t row = D * size_of(prompt_dtype);
            memset(static_cast<char*>(dprompts) + r * row, 0, static_cast<size_t>(row));
            continue;
        }
        each_chunk(D, [&](int64_t begin, int64_t count) {
            float buffer[kChunk], lost[kChunk];
            float* total = prompt_dtype == fp::kFloat32 ? static_cast<float*>(dprompts) + r * D + begin : buffer;
            bool first = true;
            for (int64_t b = 0; b < B; first = false) {
                int64_t rows[kRowsPerSum], found = 0;
                for (; b < B && found < kRowsPerSum; ++b) {
                    if (!layout.is_read(r, b)) continue;
                    rows[found++] = (layout.row_begin(b) + r - layout.start(b)) * D + begin;
                }
                const Sums sums{total, lost, first, b == B};
                with_type(dtype, [&](auto type) {
                    const auto* from = static_cast<const decltype(type)*>(dout);
                    dropout.active() ? add_rows<true>(from, rows, found, dropout, sums, count)
                                     : add_rows<false>(from, rows, found, dropout, sums, count);
                });
            }
            if (total != buffer) return;
            with_type(prompt_dtype, [&](auto type) {
                convert_row(total, static_cast<decltype(type)*>(dprompts) + r * D + begin, count);
            });
        });
    }
    return 0;
}

FP_KERNEL(prompt_embed);
FP_KERNEL(prompt_embed_backward);

}  // namespace

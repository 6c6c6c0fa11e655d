// SPDX-License-Identifier: Apache-2.0
// prompt_embed on the CPU: each output row is written once, straight from its source.
// Layout, shapes and dtypes: fastprompt/ops/prompt_embed.py.
#include <stdlib.h>

#include "common/kernel.h"
#include "cpu/simd.h"

namespace {

constexpr int64_t kBadRange = -1, kBadDType = -2, kNoMemory = -3;
constexpr int64_t kRowsPerTask = 16;

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
        if (cu_rows != nullptr && (cu_rows[0] != 0 || cu_rows[B] != L)) return false;
        for (int64_t b = 0; b < B; ++b) {
            if (rows(b) < length(b)) return false;
        }
        return true;
    }
    bool tokens_valid() const {
        if (cu_tokens != nullptr && (cu_tokens[0] < 0 || cu_tokens[B] > S)) return false;
        for (int64_t b = 0; b < B; ++b) {
            if (tokens(b) < 0 || tokens(b) > rows(b) - length(b)) return false;
        }
        return true;
    }
};

template <class P, class W>
void convert_row(const P* from, W* to, int64_t D) {
    if constexpr (std::is_same_v<P, W>) {
        memcpy(to, from, static_cast<size_t>(D) * sizeof(W));
    } else {
        for (int64_t d = 0; d < D; d += kLanes) store_at(to, d, D, load_at(from, d, D));
    }
}

template <class W>
void drop_row(const float* factors, W* row, int64_t D) {
    for (int64_t d = 0; d < D; d += kLanes) store_at(row, d, D, load_at(row, d, D) * load_at(factors, d, D));
}

// Returns INT64_MAX, or the flat index of the first token id outside the vocabulary; its row is zero.
template <class Id, class P, class W>
int64_t embed(const Layout& layout, const Id* ids, const W* weight, const P* prompts, const Dropout& dropout, W* out,
              int64_t V, int64_t D, bool* memory) {
    const int64_t total = layout.all_rows();
    const int64_t tasks = (total + kRowsPerTask - 1) / kRowsPerTask;
    int64_t first_bad = INT64_MAX;
#pragma omp parallel if (total * D >= kParallelElements) reduction(min : first_bad)
    {
        float* factors =
            dropout.active() ? static_cast<float*>(malloc(static_cast<size_t>(D) * sizeof(float))) : nullptr;
        const bool ready = factors != nullptr || !dropout.active();
        if (!ready) {
#pragma omp atomic write
            *memory = false;
        }
#pragma omp for schedule(static)
        for (int64_t task = 0; task < tasks; ++task) {
            if (!ready) continue;
            const int64_t end = total < (task + 1) * kRowsPerTask ? total : (task + 1) * kRowsPerTask;
            int64_t b = layout.sequence(task * kRowsPerTask);
            for (int64_t r = task * kRowsPerTask; r < end; ++r) {
                while (r >= layout.row_begin(b + 1)) ++b;
                const int64_t l = r - layout.row_begin(b), token = l - layout.length(b);
                W* row = out + r * D;
                if (token < 0) {
                    convert_row(prompts + (layout.start(b) + l) * D, row, D);
                } else if (token < layout.tokens(b)) {
                    const int64_t index = layout.token_begin(b) + token, id = ids[index];
                    if (id >= 0 && id < V) {
                        memcpy(row, weight + id * D, static_cast<size_t>(D) * sizeof(W));
                    } else {
                        memset(static_cast<void*>(row), 0, static_cast<size_t>(D) * sizeof(W));
                        if (index < first_bad) first_bad = index;
                    }
                } else {
                    memset(static_cast<void*>(row), 0, static_cast<size_t>(D) * sizeof(W));
                    continue;
                }
                if (dropout.active()) {
                    dropout.factors(r * D, D, factors);
                    drop_row(factors, row, D);
                }
            }
        }
        free(factors);
    }
    return first_bad;
}

// Returns 0, 1 + the flat index of the first bad token id, or a negative code. `error` is for GPUs.
int64_t prompt_embed(const void* ids, const void* weight, const void* prompts, const int64_t* starts,
                     const int64_t* lens, const int64_t* cu_tokens, const int64_t* cu_rows, const int64_t* seed,
                     void* out, int64_t* /*error*/, int64_t B, int64_t S, int64_t L, int64_t R, int64_t V, int64_t D,
                     double dropout_p, int64_t ids_are_int64, int64_t prompt_dtype, int64_t dtype, void* /*stream*/) {
    const Layout layout{starts, lens, cu_tokens, cu_rows, B, S, L, R};
    if (!layout.prompts_valid() || !layout.rows_valid() || !layout.tokens_valid()) return kBadRange;
    const Dropout dropout(seed, dropout_p);
    int64_t first_bad = INT64_MAX;
    bool known = false, memory = true;
    with_type(dtype, [&](auto w_type) {
        known = with_type(prompt_dtype, [&](auto p_type) {
            using W = decltype(w_type);
            using P = decltype(p_type);
            const W* table = static_cast<const W*>(weight);
            const P* rows = static_cast<const P*>(prompts);
            W* to = static_cast<W*>(out);
            first_bad = ids_are_int64 != 0
                            ? embed(layout, static_cast<const int64_t*>(ids), table, rows, dropout, to, V, D, &memory)
                            : embed(layout, static_cast<const int32_t*>(ids), table, rows, dropout, to, V, D, &memory);
        });
    });
    if (!known) return kBadDType;
    if (!memory) return kNoMemory;
    return first_bad == INT64_MAX ? 0 : first_bad + 1;
}

// total += row in Kahan's compensated sum; `lost` is what rounding took so far. -ffp-contract=off keeps it exact.
template <class T>
void add_row(const T* row, const float* factors, float* total, float* lost, int64_t D) {
    for (int64_t d = 0; d < D; d += kLanes) {
        vfloat value = load_at(row, d, D);
        if (factors != nullptr) value *= load_at(factors, d, D);
        const vfloat old = load_at(total, d, D);
        const vfloat addend = value - load_at(lost, d, D);
        const vfloat grown = old + addend;
        store_at(lost, d, D, (grown - old) - addend);
        store_at(total, d, D, grown);
    }
}

// dprompts[r] = sum over b of the row of dout that copied prompt row r, b ascending: one order, hence one result.
int64_t prompt_embed_backward(const void* dout, const int64_t* starts, const int64_t* lens, const int64_t* cu_rows,
                              const int64_t* seed, void* dprompts, int64_t B, int64_t L, int64_t R, int64_t D,
                              double dropout_p, int64_t dtype, int64_t prompt_dtype, void* /*stream*/) {
    const Layout layout{starts, lens, nullptr, cu_rows, B, 0, L, R};
    if (!layout.prompts_valid() || !layout.rows_valid()) return kBadRange;
    const Dropout dropout(seed, dropout_p);
    bool known = true, memory = true;
#pragma omp parallel if (B * R * D >= kParallelElements)
    {
        float* total = static_cast<float*>(malloc(3 * static_cast<size_t>(D) * sizeof(float)));
        float *lost = total + D, *factors = lost + D;
        if (total == nullptr) {
#pragma omp atomic write
            memory = false;
        }
#pragma omp for schedule(static)
        for (int64_t r = 0; r < R; ++r) {
            if (total == nullptr) continue;
            memset(total, 0, 2 * static_cast<size_t>(D) * sizeof(float));
            bool found = true;
            for (int64_t b = 0; b < B; ++b) {
                const int64_t l = r - layout.start(b);
                if (l < 0 || l >= layout.length(b)) continue;
                const int64_t row = layout.row_begin(b) + l;
                if (dropout.active()) dropout.factors(row * D, D, factors);
                found = with_type(dtype, [&](auto type) {
                    add_row(static_cast<const decltype(type)*>(dout) + row * D, dropout.active() ? factors : nullptr,
                            total, lost, D);
                });
            }
            found = found && with_type(prompt_dtype, [&](auto type) {
                        convert_row(total, static_cast<decltype(type)*>(dprompts) + r * D, D);
                    });
            if (!found) {
#pragma omp atomic write
                known = false;
            }
        }
        free(total);
    }
    return !memory ? kNoMemory : known ? 0 : kBadDType;
}

FP_KERNEL(prompt_embed);
FP_KERNEL(prompt_embed_backward);

}  // namespace

// SPDX-License-Identifier: Apache-2.0
// Products of a few queries of t5_attention with keys and values, which are read where they lie, in any dtype: packing
// them would take longer than it brings.
#pragma once
#include <stdint.h>

#include "common/dtype.h"
#include "common/kernel.h"
#include "cpu/gemm.h"
#include "cpu/lanes.h"
#include "cpu/memory.h"
#include "cpu/simd.h"
#include "cpu/t5_attention_products.h"

namespace {

// A head's rows lie H * K elements apart, nearly each in a page of its own, and no processor foresees the next. So rows
// are asked for, those that are to be written, too, so many before their turn, into the second-level cache: the first
// one waits for few lines at a time.
constexpr int64_t kRowsAhead = 16;

FP_INLINE void fetch_bytes(const void* row, int64_t bytes) {
    for (int64_t byte = 0; byte < bytes; byte += kLine) fetch_outer(static_cast<const char*>(row) + byte);
}

void fetch_row(const void* from, int64_t offset, int64_t dtype, int64_t count) {
    const int64_t size = size_of(dtype);
    fetch_bytes(static_cast<const char*>(from) + offset * size, count * size);
}

// Rows that lie so many bytes apart.
struct Spaced {
    const void* first;
    int64_t step;
    const void* at(int64_t n) const { return static_cast<const char*>(first) + n * step; }
};

// Queries of a tile, whose sums are as many as the registers hold beside the operands.
constexpr int kFewRows = kTileVectors;
constexpr int64_t kFewChain = 64;  // products of a sum in registers: short chains keep the error small

// run(i, rows), rows a constant, for tiles of rows that cover [0, count).
template <class Run>
FP_INLINE void each_few(int64_t count, const Run& run) {
    int64_t i = 0;
    for (; i + kFewRows <= count; i += kFewRows) run(i, std::integral_constant<int, kFewRows>{});
    if (kFewRows > 2 && i + 2 <= count) run(i, std::integral_constant<int, 2>{}), i += 2;
    if (i < count) run(i, std::integral_constant<int, 1>{});
}

// The gathered keys or values of an example and head.
class Rows {
public:
    void cut(Arena& arena, int64_t rows) { at_ = arena.take<const void*>(rows); }

    // Of `count` rows the first `prompt` are a prompt's, in order; the others' indices among all count from there.
    void find(const int32_t* index, int64_t count, int64_t prompt, Spaced of_prompt, Spaced own, int64_t K,
              int64_t dtype) {
        count_ = count, K_ = K, dtype_ = dtype;
        ahead_ = own.step == K * size_of(dtype) ? count : kRowsAhead;  // those side by side a processor foresees
        const void** at = at_;
        for (int64_t n = 0; n < prompt; ++n) at[n] = of_prompt.at(n);
        for (int64_t n = prompt; n < count; ++n) at[n] = own.at(index[n] - prompt);
    }

    // to[queries][kScoreRow] = q[queries][K] times rows [chunk, chunk + width); up to three more of each are undefined.
    void score(const float* q, int64_t queries, int64_t chunk, int64_t width, float* to) const {
        with_type(dtype_, [&](auto type) {
            for (int64_t n = 0; n < width; n += kAbreast) {
                const decltype(type)* row[kAbreast];
                for (int64_t j = 0; j < kAbreast; ++j) row[j] = next<decltype(type)>(chunk + n + j);
                each_few(queries,
                         [&](int64_t i, auto rows) { score_tile<rows>(q + i * K_, row, to + i * kScoreRow + n); });
            }
        });
    }

    // to[queries][K] += weights[queries][kScoreRow] times rows [chunk, chunk + width)
    void add(const float* weights, int64_t queries, int64_t chunk, int64_t width, float* to) const {
        with_type(dtype_, [&](auto type) {
            for (int64_t n = 0; n < width; n += kFewChain) {
                const int64_t first = chunk + n, count = width - n < kFewChain ? width - n : kFewChain;
                each_few(queries, [&](int64_t i, auto rows) {
                    const float* left = weights + i * kScoreRow + n;
                    int64_t d = 0;
                    const auto add_columns = [&](auto vectors) {
                        for (; d + vectors * kLanes <= K_; d += vectors * kLanes) {
                            add_tile<rows, vectors, decltype(type)>(left, first, count, d, to + i * K_ + d, i + d == 0);
                        }
                    };
                    add_columns(std::integral_constant<int, 4>{});
                    add_columns(std::integral_constant<int, 2>{});
                    add_columns(std::integral_constant<int, 1>{});
                });
            }
        });
    }

private:
    static constexpr int64_t kAbreast = 4;  // rows

    // Row n, or the last; asks for a later one, unless another tile has.
    template <class T>
    FP_INLINE const T* next(int64_t n, bool asks = true) const {
        if (asks && n + ahead_ < count_) fetch_bytes(at_[n + ahead_], K_ * static_cast<int64_t>(sizeof(T)));
        return static_cast<const T*>(at_[n < count_ ? n : count_ - 1]);
    }

    template <int ROWS, class T>
    FP_INLINE void score_tile(const float* q, const T* const* row, float* to) const {
        vfloat sum[ROWS][kAbreast] = {};
        // Unrolled, so that an instruction reads one place of each row: a processor reads ahead by such strides.
#pragma GCC unroll 4
        for (int64_t d = 0; d < K_; d += kLanes) {
            vfloat right[kAbreast];
#pragma GCC unroll 8
            for (int64_t j = 0; j < kAbreast; ++j) right[j] = load(row[j] + d);
#pragma GCC unroll 8
            for (int i = 0; i < ROWS; ++i) {
                const vfloat left = load(q + i * K_ + d);
#pragma GCC unroll 8
                for (int64_t j = 0; j < kAbreast; ++j) sum[i][j] = fused_multiply_add(left, right[j], sum[i][j]);
            }
        }
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; ++i) sum_lanes_of_four(sum[i], to + i * kScoreRow);
    }

    template <int ROWS, int VECTORS, class T>
    FP_INLINE void add_tile(const float* weights, int64_t first, int64_t count, int64_t column, float* to,
                            bool asks) const {
        vfloat sum[ROWS][VECTORS] = {};
        for (int64_t n = 0; n < count; ++n) {
            const T* row = next<T>(first + n, asks) + column;
            vfloat right[VECTORS];
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; ++v) right[v] = load(row + v * kLanes);
#pragma GCC unroll 8
            for (int i = 0; i < ROWS; ++i) {
                const vfloat weight = splat(weights[i * kScoreRow + n]);
#pragma GCC unroll 8
                for (int v = 0; v < VECTORS; ++v) sum[i][v] = fused_multiply_add(weight, right[v], sum[i][v]);
            }
        }
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; ++v) {
                float* total = to + i * K_ + v * kLanes;
                store(total, load(total) + sum[i][v]);
            }
        }
    }

    const void** at_ = nullptr;
    int64_t count_ = 0, K_ = 0, dtype_ = 0, ahead_ = 0;
};

}  // namespace

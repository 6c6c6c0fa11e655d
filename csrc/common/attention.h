// SPDX-License-Identifier: Apache-2.0
// t5_attention's tensors as Python hands them over (fastprompt/ops/_t5_attention_layout.py). Shapes and meaning:
// fastprompt/ops/t5_attention.py.
#pragma once
#include "common/dtype.h"

namespace fp {

// Elements from one example (or prompt), row and head to the next; the K columns are neighbours.
struct Strides {
    int64_t example, row, head;
};

struct Attention {
    const void *q, *k, *v;
    const float* bias;                          // [H, 2M + 1]; null: none
    const void *prompt_k, *prompt_v;            // null: no prompt
    const int64_t *prompt_ids, *prompt_lens;    // [B], [R]; null: prompt 0, all P keys
    const uint8_t* key_mask;                    // [B, S]; null: all
    const int64_t *offsets, *cu_q, *cu_k;       // [B], [B + 1], [B + 1]; null: `offset`, padded
    int64_t B, T, S, H, K, N, R, P, M, packed;  // T = S = 0 if packed; N: rows of all queries
    Strides q_strides, k_strides, v_strides, prompt_k_strides, prompt_v_strides;
    int64_t offset, causal;

    // Example b's queries are rows [query_begin(b), query_begin(b) + queries(b)) of all N, its keys likewise.
    FP_INLINE int64_t query_begin(int64_t b) const { return packed != 0 ? cu_q[b] : b * T; }
    FP_INLINE int64_t queries(int64_t b) const { return packed != 0 ? cu_q[b + 1] - cu_q[b] : T; }
    FP_INLINE int64_t key_begin(int64_t b) const { return packed != 0 ? cu_k[b] : b * S; }
    FP_INLINE int64_t keys(int64_t b) const { return packed != 0 ? cu_k[b + 1] - cu_k[b] : S; }

    // Element offset of row i of example b, head h, in a tensor of own rows whose packed form begins at row `begin`.
    FP_INLINE int64_t own(const Strides& s, int64_t b, int64_t begin, int64_t i, int64_t h) const {
        return (packed != 0 ? begin * s.row : b * s.example) + i * s.row + h * s.head;
    }

    FP_INLINE int64_t prompt(int64_t b) const { return prompt_ids == nullptr ? 0 : prompt_ids[b]; }
    FP_INLINE int64_t prompt_keys(int64_t b) const {
        return prompt_k == nullptr ? 0 : prompt_lens == nullptr ? P : prompt_lens[prompt(b)];
    }
    FP_INLINE int64_t query_offset(int64_t b) const { return offsets == nullptr ? offset : offsets[b]; }
};

}  // namespace fp

namespace {

// sizes: B to packed, then the strides, in the order of the struct.
inline fp::Attention attention(const void* q, const void* k, const void* v, const float* bias, const void* prompt_k,
                               const void* prompt_v, const int64_t* prompt_ids, const int64_t* prompt_lens,
                               const uint8_t* key_mask, const int64_t* offsets, const int64_t* cu_q,
                               const int64_t* cu_k, const int64_t* sizes, int64_t offset, int64_t causal) {
    const int64_t* s = sizes + 10;
    return {q,
            k,
            v,
            bias,
            prompt_k,
            prompt_v,
            prompt_ids,
            prompt_lens,
            key_mask,
            offsets,
            cu_q,
            cu_k,
            sizes[0],
            sizes[1],
            sizes[2],
            sizes[3],
            sizes[4],
            sizes[5],
            sizes[6],
            sizes[7],
            sizes[8],
            sizes[9],
            {s[0], s[1], s[2]},
            {s[3], s[4], s[5]},
            {s[6], s[7], s[8]},
            {s[9], s[10], s[11]},
            {s[12], s[13], s[14]},
            offset,
            causal};
}

}  // namespace

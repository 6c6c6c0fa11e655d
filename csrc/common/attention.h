// SPDX-License-Identifier: Apache-2.0
// t5_attention's tensors. Shapes and meaning: fastprompt/ops/t5_attention.py.
#pragma once
#include "common/dtype.h"
#include "common/kernel.h"

namespace fp {

// Elements from one example (or prompt), row and head to the next; the K columns are neighbours.
struct Strides {
    int64_t example, row, head;
};

struct Attention {
    const void *q, *k, *v;
    const float* bias;                              // [H, 2M + 1]; null: none
    const void *prompt_k, *prompt_v;                // null: no prompt
    const int64_t *prompt_ids, *prompt_lens;        // [B], [R]; null: prompt 0, all P keys
    const uint8_t* key_mask;                        // [B, S]; null: all
    const int64_t *offsets, *cu_q, *cu_k;           // [B], [B + 1], [B + 1]; null: `offset`, padded
    int64_t B, T, S, H, K, N, Nk, R, P, M, packed;  // T = S = 0 if packed; N, Nk: rows of all queries, of all keys
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

inline fp::Strides strides(const fp::Tensor* x) {
    if (x == nullptr) return {0, 0, 0};
    const int64_t* s = x->strides;
    return x->dims == 3 ? fp::Strides{0, s[0], s[1]} : fp::Strides{s[0], s[1], s[2]};
}

inline const void* data(const fp::Tensor* x) { return x == nullptr ? nullptr : x->data; }

// Of the tensors' shapes only those that differ are read: the launcher has compared the others.
inline fp::Attention attention(const fp::Tensor* q, const fp::Tensor* k, const fp::Tensor* v, const fp::Tensor* bias,
                               const fp::Tensor* prompt_k, const fp::Tensor* prompt_v, const int64_t* prompt_ids,
                               const int64_t* prompt_lens, const uint8_t* key_mask, const int64_t* offsets,
                               const fp::Tensor* cu_q, const int64_t* cu_k, int64_t offset, int64_t causal) {
    const bool packed = cu_q != nullptr;
    const int64_t B = packed ? cu_q->shape[0] - 1 : q->shape[0];
    const int64_t T = packed ? 0 : q->shape[1], S = packed ? 0 : k->shape[1];
    return {q->data,
            k->data,
            v->data,
            static_cast<const float*>(data(bias)),
            data(prompt_k),
            data(prompt_v),
            prompt_ids,
            prompt_lens,
            key_mask,
            offsets,
            static_cast<const int64_t*>(data(cu_q)),
            cu_k,
            B,
            T,
            S,
            q->shape[q->dims - 2],
            q->shape[q->dims - 1],
            packed ? q->shape[0] : B * T,
            packed ? k->shape[0] : B * S,
            prompt_k == nullptr ? 0 : prompt_k->shape[0],
            prompt_k == nullptr ? 0 : prompt_k->shape[1],
            bias == nullptr ? 0 : bias->shape[1] / 2,
            static_cast<int64_t>(packed),
            strides(q),
            strides(k),
            strides(v),
            strides(prompt_k),
            strides(prompt_v),
            offset,
            causal};
}

}  // namespace

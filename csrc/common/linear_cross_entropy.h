// SPDX-License-Identifier: Apache-2.0
// What becomes of a row's statistics behind the last chunk. Formulas: fastprompt/ops/linear_cross_entropy.py.
#pragma once
#include <math.h>

#include "common/dtype.h"

namespace fp {

struct RowLoss {
    float loss;
    float odds, share;  // the row's gradient is (others / share - W_label) * odds
};

}  // namespace fp

namespace {

FP_INLINE fp::RowLoss row_loss(float top, float total, float picked) {
    // An infinite logit of the label would read as certainty: it is made NaN, as in PyTorch.
    const float d = (top - (picked == INFINITY ? NAN : picked)) + logf(total);
    const float loss = d > 20.0f ? d : log1pf(expf(d));
    return {loss, 1.0f / (1.0f + expf(-d)), total < 1.0f ? 1.0f : total};  // below 1: there are no others
}

// The label, or the class next to it where there is none such: its row can be read, and its loss is NaN anyway.
FP_INLINE int64_t known_class(int64_t label, int64_t V) { return label < 0 ? 0 : label < V ? label : V - 1; }

}  // namespace

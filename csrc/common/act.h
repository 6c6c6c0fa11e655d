// SPDX-License-Identifier: Apache-2.0
// What gated_act's kernels share: the activations, numbered as in fastprompt/ops/gated_act.py, and their constants.
#pragma once
#include <cstdint>

namespace fp {

enum Act : int64_t { kGeluNew, kGelu, kSilu };

constexpr float kTwice = 1.59576912f;  // 2 sqrt(2 / pi): gelu_new(x) = x sigmoid(kTwice (x + kCubic x^3))
constexpr float kCubic = 0.044715f;
constexpr float kRootHalf = 0.70710678f;    // sqrt(1 / 2): gelu(x) = x (1 + erf(kRootHalf x)) / 2
constexpr float kDensityAt0 = 0.39894228f;  // 1 / sqrt(2 pi), the normal density's factor in gelu's slope

}  // namespace fp

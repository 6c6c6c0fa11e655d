// SPDX-License-Identifier: Apache-2.0
// Arithmetic of sizes and indices, on host and device.
#pragma once
#include "common/dtype.h"

namespace {

FP_INLINE constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

FP_INLINE constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

FP_INLINE constexpr int64_t clamp(int64_t value, int64_t low, int64_t high) {
    return value < low ? low : value > high ? high : value;
}

}  // namespace

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

// Each of 0 <= cu[0] <= ... <= cu[count] <= end: differences then cannot overflow.
FP_INLINE bool rising(const int64_t* cu, int64_t count, int64_t end) {
    if (cu[0] < 0 || cu[count] > end) return false;
    for (int64_t i = 0; i < count; ++i) {
        if (cu[i] > cu[i + 1]) return false;
    }
    return true;
}

// The same, from 0 to the end.
FP_INLINE bool covering(const int64_t* cu, int64_t count, int64_t end) {
    return cu[0] == 0 && cu[count] == end && rising(cu, count, end);
}

}  // namespace

// SPDX-License-Identifier: Apache-2.0
// AMX's instructions as csrc/cpu/tiles.h uses them, for CPUs without: eight tiles per thread, each of 16 rows of 64
// bytes. Loads and stores before a configuration, and tiles of another shape, end the process.
#pragma once
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

namespace amx {

struct Tile {
    unsigned char row[16][64];
};

inline thread_local Tile tiles[8];
inline thread_local bool configured = false;

inline Tile& tile(int number) {
    if (!configured) abort();
    return tiles[number];
}

// A bf16 of the pair, subnormal numbers as zero.
inline float half_of(uint32_t pair, int which) {
    const uint32_t bits = which == 0 ? pair << 16 : pair & 0xffff0000u;
    float value;
    memcpy(&value, &bits, sizeof(value));
    return (bits & 0x7f800000u) == 0 ? 0.0f : value;
}

}  // namespace amx

inline void _tile_loadconfig(const void* shapes) {
    const auto* bytes = static_cast<const unsigned char*>(shapes);
    if (bytes[0] != 1 || bytes[1] != 0) abort();
    for (int number = 0; number < 8; ++number) {
        if (bytes[16 + 2 * number] != 64 || bytes[17 + 2 * number] != 0 || bytes[48 + number] != 16) abort();
    }
    memset(amx::tiles, 0, sizeof(amx::tiles));
    amx::configured = true;
}

inline void _tile_release() { amx::configured = false; }

inline void _tile_zero(int to) { memset(&amx::tile(to), 0, sizeof(amx::Tile)); }

inline void _tile_loadd(int to, const void* base, int64_t stride) {
    for (int i = 0; i < 16; ++i) memcpy(amx::tile(to).row[i], static_cast<const char*>(base) + i * stride, 64);
}

inline void _tile_stored(int from, void* base, int64_t stride) {
    for (int i = 0; i < 16; ++i) memcpy(static_cast<char*>(base) + i * stride, amx::tile(from).row[i], 64);
}

// Products of the first and of the second halves are two sums, which are added at last.
inline void _tile_dpbf16ps(int sums, int left, int right) {
    for (int i = 0; i < 16; ++i) {
        for (int j = 0; j < 16; ++j) {
            float sum[2] = {}, total;
            for (int k = 0; k < 16; ++k) {
                uint32_t a, b;
                memcpy(&a, amx::tile(left).row[i] + 4 * k, sizeof(a));
                memcpy(&b, amx::tile(right).row[k] + 4 * j, sizeof(b));
                for (int half = 0; half < 2; ++half) {
                    sum[half] = __builtin_fmaf(amx::half_of(a, half), amx::half_of(b, half), sum[half]);
                }
            }
            memcpy(&total, amx::tile(sums).row[i] + 4 * j, sizeof(total));
            total += sum[0] + sum[1];
            memcpy(amx::tile(sums).row[i] + 4 * j, &total, sizeof(total));
        }
    }
}

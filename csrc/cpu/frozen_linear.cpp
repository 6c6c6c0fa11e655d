// SPDX-License-Identifier: Apache-2.0
// frozen_linear on the CPU: products of many rows with a weight, packed by tiles. Formulas:
// fastprompt/ops/frozen_linear.py.
//
// A panel of the weight, kPanelDepth x kPanelColumns, is copied so that a tile reads it in one line, and stays in the
// caches while all rows pass by. x is read where it lies: a tile has few rows, each of which it walks through once.
// Where x has not so many rows, which do not pay for copying the weight, the two change places if the weight's rows are
// dense: x is copied, and the weight read where it lies, once and in order. Every sum is over the same chains in the
// same order, but for those of a few rows: cpu/few_rows.h, and of bf16 frozen_linear_pairs.cpp.
#include <omp.h>
#include <stdlib.h>
#include <string.h>

#include "common/dtype.h"
#include "common/integers.h"
#include "common/kernel.h"
#include "cpu/few_rows.h"
#include "cpu/gemm.h"
#include "cpu/lanes.h"
#include "cpu/memory.h"
#include "cpu/simd.h"

namespace {

// So many products are added up in registers before they join the others: short chains keep the error small. Scalar
// code rounds each product.
constexpr int64_t kChain = FP_LANES > 1 ? 128 : 16;
constexpr int64_t kPanelDepth = FP_LANES == 16 ? 768 : 256;  // a multiple of kChain
constexpr int64_t kPanelColumns = 1024;                      // and of kTileColumns
constexpr int64_t kBlockRows = 96;                           // of x, read again and again from the second-level cache
constexpr int64_t kSomeRows = 300, kFewRows = 16;            // of x
constexpr int64_t kPackTiles = 64 / kTileColumns > 1 ? 64 / kTileColumns : 1;  // copied together, row by row
constexpr int64_t kAhead = 8;  // rows of the weight, asked for before they are copied
constexpr int64_t kLineFloats = kLine / 4;

static_assert(kPanelDepth % kChain == 0 && kPanelColumns % kTileColumns == 0 && kBlockRows % kTileRows == 0, "whole");

// Below so many products a second thread costs more than it brings.
constexpr int64_t kParallelProducts = 1 << 20;

void copy(float* to, const float* from, int64_t count) { memcpy(to, from, static_cast<size_t>(count) * sizeof(float)); }

template <class To, class From>
void copy(To* to, const From* from, int64_t count) {
    each_vector(count, [&](int64_t i, auto extent) { store_at(to, i, extent, load_at(from, i, extent)); });
}

// A matrix of W whose element (k, n) is data[k * row + n * column]; one of the two is 1.
template <class W>
struct Weight {
    const W* data;
    int64_t row, column;
};

// y[M][N] = or += x[M][K] b[K][N], rows of x and y dense. Half precision is how b is stored, no more.
template <class W>
struct Product {
    const float* x;
    Weight<W> b;
    float* y;
    int64_t M, K, N;
    bool adds;
    bool sparse;  // rows of x may be zero throughout, as gradients are where an example is padded
};

// Columns [n, n + kLanes) of a b whose columns are dense, rows [k, k + depth), to a tile.
template <class W>
void pack_columns(const Product<W>& p, int64_t k, int64_t depth, int64_t n, float* to) {
    const int64_t count = n < p.N ? least(p.N - n, kLanes) : 0;
    const W* from = count > 0 ? p.b.data + n * p.b.column + k : nullptr;
    int64_t d = 0;
    for (; count == kLanes && d + kLanes <= depth; d += kLanes) {
        transpose(from + d, p.b.column, to + d * kTileColumns, kTileColumns);
    }
    for (; d < depth; ++d) {
        for (int64_t i = 0; i < kLanes; ++i) {
            to[d * kTileColumns + i] = i < count ? to_float(from[i * p.b.column + d]) : 0.0f;
        }
    }
}

// Columns [n, n + kTileColumns) of b, zeros past the last, rows [k, k + depth).
template <class W>
void pack_tile(const Product<W>& p, int64_t k, int64_t depth, int64_t n, float* to) {
    if (p.b.column != 1) {
        for (int64_t i = 0; i < kTileColumns; i += kLanes) pack_columns(p, k, depth, n + i, to + i);
        return;
    }
    const int64_t count = least(p.N - n, kTileColumns);
    for (int64_t d = 0; d < depth; ++d) {
        copy(to + d * kTileColumns, p.b.data + (k + d) * p.b.row + n, count);
        for (int64_t i = count; i < kTileColumns; ++i) to[d * kTileColumns + i] = 0.0f;
    }
}

// `tiles` of them side by side, `size` floats apart. From dense rows they take lines that lie together.
template <class W>
void pack_tiles(const Product<W>& p, int64_t k, int64_t depth, int64_t n, int64_t tiles, float* to, int64_t size) {
    const int64_t whole = p.b.column == 1 ? least(tiles, (p.N - n) / kTileColumns) : 0;
    for (int64_t d = 0; whole > 0 && d < depth; ++d) {
        const W* from = p.b.data + (k + d) * p.b.row + n;
        for (int64_t t = 0; d + kAhead < depth && t < whole; ++t) fetch(from + kAhead * p.b.row + t * kTileColumns);
        for (int64_t t = 0; t < whole; ++t) {
            copy(to + t * size + d * kTileColumns, from + t * kTileColumns, kTileColumns);
        }
    }
    for (int64_t t = whole; t < tiles; ++t) pack_tile(p, k, depth, n + t * kTileColumns, to + t * size);
}

// y[ROWS][VECTORS * kLanes] = or += its products over the depth of a panel. If it asks ahead, the next ROWS rows of x,
// of which there must be as many, are on their way then.
template <int ROWS, int VECTORS>
FP_INLINE void chains(const float* x, int64_t x_row, const float* b, float* y, int64_t y_row, int64_t depth, bool adds,
                      bool asks_ahead = false) {
    for (int64_t k = 0; k < depth; k += kChain, adds = true) {
        for (int64_t i = 0; asks_ahead && i < ROWS; ++i) {
            const int64_t end = least(depth, k + kChain);
            for (int64_t j = k; j < end; j += kLineFloats) fetch_outer(x + (ROWS + i) * x_row + j);
        }
        multiply_tile<ROWS, VECTORS>(Matrix{x + k, x_row, 1}, b + k * kTileColumns, kTileColumns, y, y_row,
                                     least(depth - k, kChain), adds);
    }
}

template <int ROWS>
void tile(const float* x, int64_t x_row, const float* b, float* y, int64_t y_row, int64_t depth, bool adds) {
    // y has left the caches since the last panel: ask for it while the first chain is computed.
    for (int64_t i = 0; i < ROWS; ++i) {
        for (int64_t v = 0; v < kTileVectors; ++v) fetch(y + i * y_row + v * kLanes);
    }
    chains<ROWS, kTileVectors>(x, x_row, b, y, y_row, depth, adds);
}

// The same into y[ROWS][kTileColumns], of which only `columns` exist. No more vectors are computed than it takes.
template <int ROWS>
FP_INLINE void some_columns(const float* x, int64_t x_row, const float* b, float* y, int64_t columns, int64_t depth,
                            bool adds, bool asks_ahead = false) {
    constexpr int kThree = kTileVectors < 3 ? kTileVectors : 3;
    if (columns <= kLanes) {
        chains<ROWS, 1>(x, x_row, b, y, kTileColumns, depth, adds, asks_ahead);
    } else if (columns <= 2 * kLanes) {
        chains<ROWS, 2>(x, x_row, b, y, kTileColumns, depth, adds, asks_ahead);
    } else if (columns <= kThree * kLanes) {
        chains<ROWS, kThree>(x, x_row, b, y, kTileColumns, depth, adds, asks_ahead);
    } else {
        chains<ROWS, kTileVectors>(x, x_row, b, y, kTileColumns, depth, adds, asks_ahead);
    }
}

// A tile of which only `columns` exist.
template <int ROWS>
void edge_tile(const float* x, int64_t x_row, const float* b, float* y, int64_t y_row, int64_t columns, int64_t depth,
               bool adds) {
    float edge[ROWS * kTileColumns] = {};
    for (int64_t i = 0; adds && i < ROWS; ++i) copy(edge + i * kTileColumns, y + i * y_row, columns);
    some_columns<ROWS>(x, x_row, b, edge, columns, depth, adds);
    for (int64_t i = 0; i < ROWS; ++i) copy(y + i * y_row, edge + i * kTileColumns, columns);
}

// A panel's part, from k on, of columns [n, n + COLUMNS) of y[m..m + rows), to `turned`[COLUMNS][kTileColumns]; those
// of b being dense: x is `packed`, kPanelDepth of its columns after the other, in tiles of kTileColumns of its rows.
template <int COLUMNS>
FP_INLINE void turned_tile(const Product<float>& p, int64_t n, int64_t m, int64_t k, const float* packed,
                           float* turned) {
    const float* b = p.b.data + n * p.b.column + k;
    const int64_t rows = least(p.M - m, kTileColumns), all_rows = round_up(p.M, kTileColumns);
    const int64_t depth = least(p.K - k, kPanelDepth);
    const bool asks_ahead = m == 0 && p.N - n >= 2 * static_cast<int64_t>(COLUMNS);
    const float* tile = packed + k * all_rows + m * depth;
    some_columns<COLUMNS>(b, p.b.column, tile, turned, rows, depth, p.adds || k > 0, asks_ahead);
}

// Those columns of all rows of y.
template <int COLUMNS>
void turned_tiles(const Product<float>& p, int64_t n, const float* packed) {
    for (int64_t m = 0; m < p.M; m += kTileColumns) {
        const int64_t rows = least(p.M - m, kTileColumns);
        float* y = p.y + m * p.N + n;
        float turned[COLUMNS * kTileColumns] = {};
        for (int64_t i = 0; p.adds && i < rows; ++i) {
            for (int64_t j = 0; j < COLUMNS; ++j) turned[j * kTileColumns + i] = y[i * p.N + j];
        }
        for (int64_t k = 0; k < p.K; k += kPanelDepth) turned_tile<COLUMNS>(p, n, m, k, packed, turned);
        for (int64_t i = 0; i < rows; ++i) {
            for (int64_t j = 0; j < COLUMNS; ++j) y[i * p.N + j] = turned[j * kTileColumns + i];
        }
    }
}

constexpr int64_t kTurned = int64_t{8} * kTileRows;
static_assert(kTurned % kLanes == 0, "whole vectors");

// The same of kTurned columns, which reach y in whole vectors: one by one they took a thirtieth of the time. A panel of
// x's tile stays in the first-level cache, or near it, while they pass by.
void turned_group(const Product<float>& p, int64_t n, const float* packed) {
    alignas(64) float turned[kTurned * kTileColumns];
    for (int64_t m = 0; m < p.M; m += kTileColumns) {
        const int64_t rows = least(p.M - m, kTileColumns);
        int64_t k = 0;
        do {  // K is not 0, so all of `turned` is written
            for (int64_t j = 0; j < kTurned; j += kTileRows) {
                turned_tile<kTileRows>(p, n + j, m, k, packed, turned + j * kTileColumns);
            }
            k += kPanelDepth;
        } while (k < p.K);
        float* y = p.y + m * p.N + n;
        int64_t i = 0;
        for (; i + kLanes <= rows; i += kLanes) {
            for (int64_t j = 0; j < kTurned; j += kLanes) {
                transpose(turned + j * kTileColumns + i, kTileColumns, y + i * p.N + j, p.N);
            }
        }
        for (; i < rows; ++i) {
            for (int64_t j = 0; j < kTurned; ++j) y[i * p.N + j] = turned[j * kTileColumns + i];
        }
    }
}

bool is_zero(const float* row, int64_t count) {
    if (row[0] != 0.0f) return false;  // as good as always
    uint32_t bits = 0;
    for (int64_t i = 0; i < count; ++i) bits |= bit_cast<uint32_t>(row[i]);
    return bits << 1 == 0;  // of -0 the sign is left
}

// ROWS rows of x that are zero: so are those of y, up to what it has already.
template <int ROWS>
bool skip_tile(const float* x, int64_t x_row, float* y, int64_t y_row, int64_t columns, int64_t depth, bool adds) {
    for (int64_t i = 0; i < ROWS; ++i) {
        if (!is_zero(x + i * x_row, depth)) return false;
    }
    for (int64_t i = 0; !adds && i < ROWS; ++i) {
        for (int64_t j = 0; j < columns; ++j) y[i * y_row + j] = 0.0f;
    }
    return true;
}

// body(std::integral_constant<int, rows>) for 1 to kTileRows rows.
template <class Body>
FP_INLINE void with_rows(int64_t rows, const Body& body) {
    switch (rows) {
        case 1: return body(std::integral_constant<int, 1>{});
        case 2: return body(std::integral_constant<int, 2>{});
        case 3: return body(std::integral_constant<int, 3>{});
        case 4: return body(std::integral_constant<int, 4>{});
        case 5: return body(std::integral_constant<int, 5>{});
        default: return body(std::integral_constant<int, kTileRows>{});
    }
}

// Rows [first, first + rows) of y, columns [n, n + kTileColumns): their products with a packed tile.
template <class W>
void block(const Product<W>& p, int64_t first, int64_t rows, int64_t k, int64_t depth, const float* packed, int64_t n) {
    const int64_t columns = least(p.N - n, kTileColumns);
    const bool adds = p.adds || k > 0;
    const auto some = [&](auto count, int64_t i) {
        constexpr int kRows = decltype(count)::value;
        const float* x = p.x + (first + i) * p.K + k;
        float* y = p.y + (first + i) * p.N + n;
        if (p.sparse && skip_tile<kRows>(x, p.K, y, p.N, columns, depth, adds)) return;
        if (columns == kTileColumns) return tile<kRows>(x, p.K, packed, y, p.N, depth, adds);
        edge_tile<kRows>(x, p.K, packed, y, p.N, columns, depth, adds);
    };
    for (int64_t i = 0; i < rows; i += kTileRows) {
        with_rows(least(rows - i, kTileRows), [&](auto count) { some(count, i); });
    }
}

int64_t tiles_of(int64_t columns) { return round_up(columns, kTileColumns) / kTileColumns; }

// Into how many groups of tiles a panel is cut: few blocks of rows alone would leave threads without work.
int64_t groups_of(int64_t tiles, int64_t blocks) {
    const int64_t jobs = 4 * static_cast<int64_t>(omp_get_num_threads());
    return least(tiles, round_up(jobs, blocks) / blocks);
}

// Memory for `floats` of what is packed, aligned for vectors; null if there is none.
float* packing_space(int64_t floats) {
    return static_cast<float*>(allocate_lines(floats * static_cast<int64_t>(sizeof(float))));
}

// Not many rows, and columns of b that are dense: x and b change places.
int64_t multiply_turned(const Product<float>& p) {
    const Product<float> turned{nullptr, {p.x, 1, p.K}, nullptr, p.N, p.K, p.M, false, false};  // of which x is packed
    const int64_t all_rows = round_up(p.M, kTileColumns);
    float* packed = packing_space(p.K * all_rows);
    if (packed == nullptr) return fp::kNoMemory;
#pragma omp parallel if (p.M * p.N * p.K >= kParallelProducts)
    {
#pragma omp for schedule(static)
        for (int64_t m = 0; m < p.M; m += kTileColumns) {
            for (int64_t k = 0; k < p.K; k += kPanelDepth) {
                const int64_t depth = least(p.K - k, kPanelDepth);
                pack_tile(turned, k, depth, m, packed + k * all_rows + m * depth);
            }
        }
#pragma omp for schedule(dynamic)
        for (int64_t n = 0; n < p.N; n += kTurned) {
            if (!p.adds && p.N - n >= kTurned) {
                turned_group(p, n, packed);
                continue;
            }
            for (int64_t i = n; i < least(p.N, n + kTurned); i += kTileRows) {
                with_rows(least(p.N - i, kTileRows),
                          [&](auto count) { turned_tiles<decltype(count)::value>(p, i, packed); });
            }
        }
    }
    free(packed);
    return 0;
}

// Not many rows: each thread packs the tiles that it multiplies with, and waits for nobody.
template <class W>
int64_t multiply_some_rows(const Product<W>& p) {
    const int64_t size = least(p.K, kPanelDepth) * kTileColumns;
    float* space = packing_space(kPackTiles * size * omp_get_max_threads());
    if (space == nullptr) return fp::kNoMemory;
#pragma omp parallel for schedule(dynamic) if (p.M * p.N * p.K >= kParallelProducts)
    for (int64_t n = 0; n < p.N; n += kPackTiles * kTileColumns) {
        float* packed = space + kPackTiles * size * omp_get_thread_num();
        const int64_t tiles = least(tiles_of(p.N - n), kPackTiles);
        for (int64_t k = 0; k < p.K; k += kPanelDepth) {
            const int64_t depth = least(p.K - k, kPanelDepth);
            pack_tiles(p, k, depth, n, tiles, packed, size);
            for (int64_t t = 0; t < tiles; ++t) block(p, 0, p.M, k, depth, packed + t * size, n + t * kTileColumns);
        }
    }
    free(space);
    return 0;
}

// Many blocks: all threads pack a panel together, then share out blocks and groups of tiles.
template <class W>
int64_t multiply_many_rows(const Product<W>& p) {
    float* packed = packing_space(least(p.K, kPanelDepth) * least(tiles_of(p.N) * kTileColumns, kPanelColumns));
    if (packed == nullptr) return fp::kNoMemory;
    const int64_t blocks = round_up(p.M, kBlockRows) / kBlockRows;
#pragma omp parallel if (p.M * p.N * p.K >= kParallelProducts)
    for (int64_t n = 0; n < p.N; n += kPanelColumns) {
        const int64_t tiles = tiles_of(least(p.N - n, kPanelColumns));
        const int64_t groups = groups_of(tiles, blocks);
        for (int64_t k = 0; k < p.K; k += kPanelDepth) {
            const int64_t depth = least(p.K - k, kPanelDepth), size = depth * kTileColumns;
#pragma omp for schedule(static)
            for (int64_t t = 0; t < tiles; t += kPackTiles) {
                const int64_t some = least(tiles - t, kPackTiles);
                pack_tiles(p, k, depth, n + t * kTileColumns, some, packed + t * size, size);
            }
#pragma omp for schedule(dynamic)
            for (int64_t job = 0; job < blocks * groups; ++job) {
                const int64_t first = job / groups * kBlockRows, rows = least(p.M - first, kBlockRows);
                const int64_t group = job % groups, end = (group + 1) * tiles / groups;
                for (int64_t t = group * tiles / groups; t < end; ++t) {
                    block(p, first, rows, k, depth, packed + t * size, n + t * kTileColumns);
                }
            }
        }
    }
    free(packed);
    return 0;
}

template <class W>
int64_t multiply(const Product<W>& p) {
    if (p.M > kSomeRows) return multiply_many_rows(p);
    if (p.M <= kFewRows && p.b.row == 1 && !p.adds) {
        return multiply_few<Floats<W>>(p.x, p.b.data, p.y, 1, p.M, p.N, p.K, 0, p.b.column);
    }
    if constexpr (std::is_same_v<W, float>) {
        if (p.b.column != 1) return multiply_turned(p);
    }
    return multiply_some_rows(p);
}

// The same for each of B examples, whose b lie b_step apart. Where they suffice for all threads, one takes whole ones:
// the parallel regions inside are then its own. Otherwise there must be no region around those, not even one of a
// single thread: OpenMP would start new threads for what it takes to be nested.
template <class W>
int64_t multiply_each(int64_t B, const Product<W>& p, int64_t b_step) {
    if (p.M < 1 || p.N < 1 || p.K < 1) return fp::kBadOption;
    int64_t status = 0;
    const auto multiply_one = [&](int64_t i) {
        const Weight<W> b{p.b.data + i * b_step, p.b.row, p.b.column};
        return multiply(Product<W>{p.x + i * p.M * p.K, b, p.y + i * p.M * p.N, p.M, p.K, p.N, p.adds, p.sparse});
    };
    if (B >= omp_get_max_threads() && B * p.M * p.N * p.K >= kParallelProducts) {
#pragma omp parallel for schedule(static) reduction(min : status)
        for (int64_t i = 0; i < B; ++i) status = least(status, multiply_one(i));
    } else {
        for (int64_t i = 0; i < B; ++i) status = least(status, multiply_one(i));
    }
    return status;
}

// w[b * w_example + n * w_row + k * w_column] is element (n, k) of example b's weight; all are of `dtype`.
int64_t frozen_linear(const void* x, const void* w, void* y, int64_t B, int64_t M, int64_t N, int64_t K,
                      int64_t w_example, int64_t w_row, int64_t w_column, int64_t dtype, void* /*stream*/) {
    int64_t status = fp::kBadOption;
    if (!is_dtype(dtype)) return status;
    with_type(dtype, [&](auto type) {
        using T = decltype(type);
        const Weight<T> b{static_cast<const T*>(w), w_column, w_row};
        if constexpr (std::is_same_v<T, float>) {
            const Product<T> p{static_cast<const T*>(x), b, static_cast<T*>(y), M, K, N, false, false};
            status = multiply_each(B, p, w_example);
        } else {
            float* wide = packing_space(B * M * (K + N));
            if (wide == nullptr) {
                status = fp::kNoMemory;
                return;
            }
            float* sums = wide + B * M * K;
            each_chunk_parallel(B * M * K, [&](int64_t begin, int64_t count) {
                copy(wide + begin, static_cast<const T*>(x) + begin, count);
            });
            status = multiply_each<T>(B, {wide, b, sums, M, K, N, false, false}, w_example);
            each_chunk_parallel(status == 0 ? B * M * N : 0, [&](int64_t begin, int64_t count) {
                copy(static_cast<T*>(y) + begin, sums + begin, count);
            });
            free(wide);
        }
    });
    return status;
}

// The same, but for dy and dx, to which several add: they are fp32.
int64_t frozen_linear_backward(const float* dy, const void* w, float* dx, int64_t B, int64_t M, int64_t N, int64_t K,
                               int64_t w_example, int64_t w_row, int64_t w_column, int64_t dtype, int64_t adds,
                               void* /*stream*/) {
    int64_t status = fp::kBadOption;
    if (!is_dtype(dtype)) return status;
    with_type(dtype, [&](auto type) {
        const Weight<decltype(type)> b{static_cast<const decltype(type)*>(w), w_row, w_column};
        status = multiply_each<decltype(type)>(B, {dy, b, dx, M, N, K, adds != 0, true}, w_example);
    });
    return status;
}

FP_KERNEL(frozen_linear);
FP_KERNEL(frozen_linear_backward);

}  // namespace

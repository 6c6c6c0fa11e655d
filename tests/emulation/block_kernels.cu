// SPDX-License-Identifier: Apache-2.0
// Kernels that test_emulation.py runs to test the emulation itself: blocks, barriers, shared memory, atomics. Many have
// a fault planted by a template argument.
#include "common/kernel.h"
#include "cuda/launch.h"

namespace {

// out[block] = sum of the block's x. Without the barrier, threads race to the partial sums; kSeen: through FP_SHARED's
// own elements, else through a plain pointer to them, where the emulation cannot look.
template <bool kBarrier, bool kSeen>
__global__ void block_sum(const float* x, float* out) {
    FP_SHARED(float, partial, 256);
    float* unseen = kSeen ? nullptr : &partial[0];
    const unsigned t = threadIdx.x, i = blockIdx.x * blockDim.x + t;
    if (kSeen) {
        partial[t] = x[i];
    } else {
        unseen[t] = x[i];
    }
    for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
        if (kBarrier) __syncthreads();
        if (t >= half) continue;
        if (kSeen) {
            partial[t] += partial[t + half];
        } else {
            unseen[t] += unseen[t + half];
        }
    }
    if (t == 0) out[blockIdx.x] = kSeen ? partial[0] : unseen[0];
}

int64_t sum(const float* x, float* out, int64_t blocks, int64_t threads, void* stream) {
    return launch(block_sum<true, true>, dim3(blocks), dim3(threads), stream, x, out);
}
int64_t sum_unseen(const float* x, float* out, int64_t blocks, int64_t threads, void* stream) {
    return launch(block_sum<true, false>, dim3(blocks), dim3(threads), stream, x, out);
}
int64_t sum_without_barrier(const float* x, float* out, int64_t blocks, int64_t threads, void* stream) {
    return launch(block_sum<false, true>, dim3(blocks), dim3(threads), stream, x, out);
}
int64_t sum_without_barrier_unseen(const float* x, float* out, int64_t blocks, int64_t threads, void* stream) {
    return launch(block_sum<false, false>, dim3(blocks), dim3(threads), stream, x, out);
}

// The second value is written before all have read the first: the barrier that loops forget.
__global__ void reuse(const float* x, float* out) {
    FP_SHARED(float, value, 1);
    for (int i = 0; i < 2; ++i) {
        if (threadIdx.x == 0) value[0] = x[i];
        __syncthreads();
        out[i * blockDim.x + threadIdx.x] = value[0];
    }
}
int64_t reuse_without_barrier(const float* x, float* out, int64_t threads, void* stream) {
    return launch(reuse, dim3(1), dim3(threads), stream, x, out);
}

// Thread 41 writes what it has read itself, and one or two before it that no barrier makes it wait for.
template <bool kBarrier>
__global__ void write_after_reads(float* out) {
    FP_SHARED(float, value, 1);
    const unsigned t = threadIdx.x;
    if (t == 0) value[0] = 1.0f;
    __syncthreads();
    if (t == 5 || t == 40 || t == 41) out[t] = value[0];
    if (kBarrier) __syncthreads();
    if (t >= 32) __syncwarp();
    if (t == 41) value[0] = 2.0f;
}
int64_t written_after_reads(float* out, void* stream) {
    return launch(write_after_reads<true>, dim3(1), dim3(64), stream, out);
}
int64_t written_among_reads(float* out, void* stream) {
    return launch(write_after_reads<false>, dim3(1), dim3(64), stream, out);
}

enum Divergence { kSomeEnd, kSomeElsewhere };

template <Divergence kHow>
__global__ void diverge() {
    if (threadIdx.x < 40) {
        __syncthreads();
    } else if (kHow == kSomeElsewhere) {
        __syncthreads();
    }
}
int64_t barrier_that_some_miss(void* stream) { return launch(diverge<kSomeEnd>, dim3(1), dim3(64), stream); }
int64_t barriers_in_two_places(void* stream) { return launch(diverge<kSomeElsewhere>, dim3(1), dim3(64), stream); }

template <bool kSeen>
__global__ void read_uninitialised(float* out) {
    FP_SHARED(float, value, 4);
    out[threadIdx.x] = kSeen ? value[threadIdx.x] : (&value[0])[threadIdx.x];
}
int64_t uninitialised(float* out, void* stream) {
    return launch(read_uninitialised<true>, dim3(1), dim3(4), stream, out);
}
int64_t uninitialised_unseen(float* out, void* stream) {
    return launch(read_uninitialised<false>, dim3(1), dim3(4), stream, out);
}

__global__ void index_past_end(int64_t index) {
    FP_SHARED(int, value, 4);
    value[index] = 1;
}
int64_t shared_index(int64_t index, void* stream) { return launch(index_past_end, dim3(1), dim3(1), stream, index); }

// out[thread's place in the whole grid] = that place, in three dimensions.
__global__ void places(int* out) {
    const unsigned x = blockIdx.x * blockDim.x + threadIdx.x, y = blockIdx.y * blockDim.y + threadIdx.y;
    const unsigned z = blockIdx.z * blockDim.z + threadIdx.z;
    const unsigned i = (z * gridDim.y * blockDim.y + y) * gridDim.x * blockDim.x + x;
    out[i] = static_cast<int>(i);
}
int64_t grid_places(int* out, void* stream) { return launch(places, dim3(3, 2, 5), dim3(4, 3, 2), stream, out); }
int64_t launch_shape(int64_t blocks, int64_t threads, int* out, void* stream) {
    return launch(places, dim3(blocks), dim3(threads), stream, out);
}

// Of x [blocks * threads]: the number of positive ones, the largest, their sum; and how many blocks came first.
__global__ void gather(const int* x, int* positive, int* largest, float* total, int* first) {
    FP_SHARED(int, count, 1);
    if (threadIdx.x == 0) count[0] = 0;
    __syncthreads();
    const int value = x[blockIdx.x * blockDim.x + threadIdx.x];
    if (value > 0) atomicAdd(&count[0], 1);
    atomicMax(largest, value);
    atomicAdd(total, static_cast<float>(value));
    __syncthreads();
    if (threadIdx.x != 0) return;
    atomicAdd(positive, *&count[0]);
    if (atomicCAS(first, -1, static_cast<int>(blockIdx.x)) == -1) atomicAdd(first, 1000);
}
int64_t atomics(const int* x, int* positive, int* largest, float* total, int* first, int64_t blocks, int64_t threads,
                void* stream) {
    return launch(gather, dim3(blocks), dim3(threads), stream, x, positive, largest, total, first);
}

__global__ void copy_four(const float* x, float* out) {
    *reinterpret_cast<float4*>(out) = *reinterpret_cast<const float4*>(x);
}
int64_t copied_four(const float* x, float* out, void* stream) {
    return launch(copy_four, dim3(1), dim3(1), stream, x, out);
}

__global__ void copy(const float* x, float* out, int64_t count) {
    for (int64_t i = threadIdx.x; i < count; i += blockDim.x) out[i] = x[i];
}
int64_t copied(const float* x, float* out, int64_t count, void* stream) {
    return launch(copy, dim3(1), dim3(32), stream, x, out, count);
}

FP_KERNEL(sum);
FP_KERNEL(sum_unseen);
FP_KERNEL(sum_without_barrier);
FP_KERNEL(sum_without_barrier_unseen);
FP_KERNEL(reuse_without_barrier);
FP_KERNEL(written_after_reads);
FP_KERNEL(written_among_reads);
FP_KERNEL(barrier_that_some_miss);
FP_KERNEL(barriers_in_two_places);
FP_KERNEL(uninitialised);
FP_KERNEL(uninitialised_unseen);
FP_KERNEL(shared_index);
FP_KERNEL(grid_places);
FP_KERNEL(launch_shape);
FP_KERNEL(atomics);
FP_KERNEL(copied);
FP_KERNEL(copied_four);

}  // namespace

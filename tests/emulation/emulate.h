// SPDX-License-Identifier: Apache-2.0
// Runs CUDA kernels on a CPU: to g++ what csrc/cuda/launch.h is to nvcc. docs/cuda-emulation.md explains it.
//
// Every CUDA thread is a fiber. It runs until it ends or must wait, for its block or for lanes of its warp; then
// another does, in an order that a test chooses. Blocks run one after the other.
#pragma once
#include <cstring>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include "cuda_words.h"

extern uint3 threadIdx, blockIdx;  // of the fiber that runs
extern dim3 blockDim, gridDim;

namespace emulate {

// A place in the source, for messages and to tell one barrier from another.
struct Site {
    const char* file;
    int line;
};

// Ends the launch; the fibers are abandoned where they stand.
[[noreturn]] void fail(const std::string& message);

// Waits for all threads of the block.
void barrier(Site site);

// What the lanes of a warp do together: those of `mask` that have not ended must all make the same call.
enum Exchange {
    kShuffle,  // returns the value of lane `source`
    kVote,     // returns a bit for each lane whose value is not 0
    kSync,     // orders what the lanes did to shared memory
};
uint64_t exchange(Site site, Exchange kind, unsigned mask, uint64_t value, int source);

inline int lane() {
    return static_cast<int>((threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % 32);
}

// A lane whose source is not `inside` its segment of the warp keeps its own value.
template <class T>
T shuffle(Site site, unsigned mask, T value, int source, bool inside = true) {
    static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof(T));
    bits = exchange(site, kShuffle, mask, bits, inside ? source : lane());
    memcpy(&value, &bits, sizeof(T));
    return value;
}

// The segments of `width` lanes that shuffles stay in.
inline int segment(int width) { return lane() / width * width; }

template <class T>
T shfl(Site site, unsigned mask, T value, int source, int width = 32) {
    return shuffle(site, mask, value, segment(width) + source % width);
}
template <class T>
T shfl_xor(Site site, unsigned mask, T value, int bits, int width = 32) {
    return shuffle(site, mask, value, lane() ^ bits, (lane() ^ bits) < segment(width) + width);
}
template <class T>
T shfl_up(Site site, unsigned mask, T value, int delta, int width = 32) {
    return shuffle(site, mask, value, lane() - delta, lane() - delta >= segment(width));
}
template <class T>
T shfl_down(Site site, unsigned mask, T value, int delta, int width = 32) {
    return shuffle(site, mask, value, lane() + delta, lane() + delta < segment(width) + width);
}
inline unsigned ballot(Site site, unsigned mask, int predicate) {
    return static_cast<unsigned>(exchange(site, kVote, mask, predicate != 0, 0));
}
inline void sync_warp(Site site, unsigned mask = 0xffffffffu) { exchange(site, kSync, mask, 0, 0); }

// Who touched an element of shared memory, and how many barriers and __syncwarp that thread had passed by then.
struct Access {
    int thread = -1;
    uint64_t barriers = 0, warp_syncs = 0;
};

// A warp's reads of an element since the element was written, and since the barrier that they came after.
struct Reads {
    uint64_t barriers = 0;
    unsigned lanes = 0;       // a bit for each lane that read,
    uint64_t warp_syncs[32];  // which then had passed so many
};

// One array of the running block's shared memory.
struct SharedMemory {
    struct Element {
        Access write;
        std::vector<Reads> reads;  // by warp
    };
    const char* name;
    size_t size;  // bytes
    std::unique_ptr<unsigned char[]> bytes;
    std::vector<Element> elements;
    bool address_taken;  // then its accesses go unseen, and unchecked

    void check_read(size_t index);
    void check_write(size_t index);
};

// The array declared at `key`. A block finds it filled with 0xff: NaN, or -1.
SharedMemory& shared_memory(const void* key, const char* name, size_t count, size_t element_size);

// An element of shared memory that reports races, and reads of what nobody wrote.
template <class T>
class SharedElement {
public:
    SharedElement(SharedMemory& memory, size_t index) : memory_(memory), index_(index) {}
    operator T() const {
        memory_.check_read(index_);
        return *address();
    }
    T operator=(const T& value) const {
        memory_.check_write(index_);
        return *address() = value;
    }
    T operator=(const SharedElement& other) const { return *this = static_cast<T>(other); }
    T operator+=(const T& value) const { return *this = static_cast<T>(*this) + value; }
    T* operator&() const {
        memory_.address_taken = true;
        return address();
    }

private:
    T* address() const { return reinterpret_cast<T*>(memory_.bytes.get()) + index_; }
    SharedMemory& memory_;
    size_t index_;
};

template <class T>
class SharedArray {
public:
    SharedArray(const void* key, const char* name, size_t count)
        : memory_(shared_memory(key, name, count, sizeof(T))) {}
    template <class I>
    SharedElement<T> operator[](I index) const {
        if (static_cast<size_t>(index) >= memory_.elements.size()) {
            fail("index " + std::to_string(index) + " is outside shared " + memory_.name + "[" +
                 std::to_string(memory_.elements.size()) + "]");
        }
        return {memory_, static_cast<size_t>(index)};
    }

private:
    SharedMemory& memory_;
};

int64_t run(dim3 grid, dim3 block, void (*body)(void*), void* context);

}  // namespace emulate

#define FP_HERE (emulate::Site{__FILE__, __LINE__})
#define __syncthreads() emulate::barrier(FP_HERE)
#define __syncwarp(...) emulate::sync_warp(FP_HERE __VA_OPT__(, ) __VA_ARGS__)
#define __shfl_sync(...) emulate::shfl(FP_HERE, __VA_ARGS__)
#define __shfl_xor_sync(...) emulate::shfl_xor(FP_HERE, __VA_ARGS__)
#define __shfl_up_sync(...) emulate::shfl_up(FP_HERE, __VA_ARGS__)
#define __shfl_down_sync(...) emulate::shfl_down(FP_HERE, __VA_ARGS__)
#define __ballot_sync(MASK, PREDICATE) emulate::ballot(FP_HERE, MASK, PREDICATE)
#define __any_sync(MASK, PREDICATE) (emulate::ballot(FP_HERE, MASK, PREDICATE) != 0)
#define __all_sync(MASK, PREDICATE) (emulate::ballot(FP_HERE, MASK, !(PREDICATE)) == 0)

#define FP_SHARED(T, NAME, COUNT) \
    static char NAME##_key;       \
    const emulate::SharedArray<T> NAME(&NAME##_key, #NAME, COUNT)

namespace {

constexpr int64_t kMaxBlocks = 8;

template <class T>
struct Itself {
    using type = T;
};

template <class... P>
int64_t launch(void (*kernel)(P...), dim3 grid, dim3 block, void*, typename Itself<P>::type... arguments) {
    auto call = [&] { kernel(arguments...); };
    const auto body = [](void* context) { (*static_cast<decltype(call)*>(context))(); };
    return emulate::run(grid, block, body, &call);
}

}  // namespace

// SPDX-License-Identifier: Apache-2.0
// The one door between Python and native code.
//
// A native kernel is a static function `int64_t NAME(args...)` over raw pointers to tensors' elements, int64_t and
// double; where it reads strides, over Tensor pointers (null: None).
// FP_KERNEL(NAME) puts it in the table that bindings.cpp shows to Python, so that adding an op never touches
// bindings.cpp. The same source may be compiled for several targets (FP_TARGET: "scalar", "avx2", "neon", "cuda", ...).
//
// The table is a linker section of constant-initialised pointers: no constructor runs at load time, which matters in
// files compiled for AVX-512 on a machine that lacks it. Everything here has internal linkage for the same reason: a
// weak template instance compiled for AVX-512 must never replace its twin in a scalar file.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include <type_traits>
#include <utility>

#ifndef FP_TARGET
#error "FP_TARGET must name the target this file is compiled for"
#endif

namespace fp {

// Returned in place of 0 where a kernel cannot run. kernel_object.cpp raises on the first two; kBadRange goes to the
// launcher, which knows the tensors' names. A call that is made again has no launcher, and raises on every status.
constexpr int64_t kNoMemory = -1, kBadOption = -2, kBadRange = -3;

// A tensor as its kernel sees it; strides in elements.
struct Tensor {
    void* data;
    int64_t dims;
    const int64_t *shape, *strides;
};

// One argument: an integer, an address or a float.
union Slot {
    int64_t i;
    double d;
};

struct Kernel {
    const char* name;
    const char* target;
    const char* signature;  // a letter per argument: t Tensor, p pointer, i integer, d floating point
    int64_t (*invoke)(const Slot* arguments);
};

}  // namespace fp

namespace {

template <class T>
constexpr char letter() {
    if (std::is_same_v<T, const fp::Tensor*>) return 't';
    return std::is_pointer_v<T> ? 'p' : std::is_integral_v<T> ? 'i' : 'd';
}

template <class T>
T argument(const fp::Slot& slot) {
    if constexpr (std::is_pointer_v<T>) {
        return reinterpret_cast<T>(slot.i);
    } else if constexpr (std::is_integral_v<T>) {
        return static_cast<T>(slot.i);
    } else {
        return static_cast<T>(slot.d);
    }
}

template <auto F>
struct Entry;

template <class... A, int64_t (*F)(A...)>
struct Entry<F> {
    static constexpr char signature[] = {letter<A>()..., '\0'};

    template <size_t... I>
    static int64_t unpack(const fp::Slot* slots, std::index_sequence<I...>) {
        return F(argument<A>(slots[I])...);
    }
    static int64_t invoke(const fp::Slot* slots) { return unpack(slots, std::index_sequence_for<A...>{}); }
};

}  // namespace

#define FP_KERNEL(NAME)                                                                                             \
    static const fp::Kernel NAME##_kernel = {#NAME, FP_TARGET, Entry<&(NAME)>::signature, &Entry<&(NAME)>::invoke}; \
    __attribute__((section("fp_kernels"), used, unused)) static const fp::Kernel* const NAME##_table_entry =        \
        &NAME##_kernel

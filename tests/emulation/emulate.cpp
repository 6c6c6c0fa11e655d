// SPDX-License-Identifier: Apache-2.0
// The machine behind emulate.h: fibers, their scheduler, and the checks.
#include "emulate.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <numeric>
#include <random>

#include "common/kernel.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
inline void __sanitizer_start_switch_fiber(void**, const void*, size_t) {}
inline void __sanitizer_finish_switch_fiber(void*, const void**, size_t*) {}
#define ASAN_UNPOISON_MEMORY_REGION(ADDRESS, BYTES)
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulate {
namespace {

constexpr size_t kStackBytes = 256 * 1024, kGuardBytes = 4096, kSharedBytes = 48 * 1024;

enum State { kReady, kAtBarrier, kInExchange, kEnded };

struct Fiber {
    unsigned char* stack = nullptr;
    bool started = false;
    void* registers[5];  // __builtin_setjmp's
    void* fake_stack = nullptr;

    uint3 thread;
    State state;
    Site site;  // where it waits
    Exchange kind;
    unsigned mask;
    uint64_t value, result;
    int source;

    uint64_t warp_syncs[32];  // of each lane of its warp: how many __syncwarp that lane had passed when this one last
                              // heard of it, itself or through others. What that lane did before is over.
};

enum Order { kForward, kReverse, kShuffled };

Order order;
uint64_t seed;
std::mt19937_64 dice;

std::vector<Fiber> fibers;  // a pool: stacks are kept from launch to launch
size_t threads;             // of the block: the first ones of the pool
Fiber* current;
void* scheduler_registers[5];
void* scheduler_fake_stack;
const void* scheduler_stack;
size_t scheduler_stack_bytes;

void (*kernel_body)(void*);
void* kernel_context;

std::string error;  // the first one; it ends the launch
uint64_t barriers;  // passed by the block
std::map<const void*, SharedMemory> arrays;

// Fibers switch with __builtin_setjmp, which makes no system call; ucontext only enters a new stack. gcc wants both
// ends of a jump in functions of their own.
#define FP_SWITCH __attribute__((noinline, no_sanitize("address")))

[[noreturn]] FP_SWITCH void jump(void** registers) { __builtin_longjmp(registers, 1); }

FP_SWITCH void suspend() {
    __sanitizer_start_switch_fiber(&current->fake_stack, scheduler_stack, scheduler_stack_bytes);
    if (__builtin_setjmp(current->registers) == 0) jump(scheduler_registers);
    __sanitizer_finish_switch_fiber(current->fake_stack, nullptr, nullptr);
}

void fiber_main() {
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
    for (;;) {
        kernel_body(kernel_context);
        current->state = kEnded;
        suspend();
    }
}

[[noreturn]] FP_SWITCH void enter_stack() {
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = current->stack;
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    makecontext(&context, fiber_main, 0);
    current->started = true;
    setcontext(&context);
    __builtin_unreachable();
}

FP_SWITCH void resume(Fiber& fiber) {
    current = &fiber;
    threadIdx = fiber.thread;
    __sanitizer_start_switch_fiber(&scheduler_fake_stack, fiber.stack, kStackBytes);
    if (__builtin_setjmp(scheduler_registers) == 0) {
        if (!current->started) enter_stack();
        jump(current->registers);
    }
    __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
}

unsigned char* new_stack() {
    const int access = PROT_READ | PROT_WRITE, flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    auto* memory = static_cast<unsigned char*>(mmap(nullptr, kGuardBytes + kStackBytes, access, flags, -1, 0));
    mprotect(memory, kGuardBytes, PROT_NONE);
    return memory + kGuardBytes;
}

void start_fibers() {
    if (fibers.size() < threads) fibers.resize(threads);
    for (unsigned i = 0; i < threads; ++i) {
        if (fibers[i].stack == nullptr) fibers[i].stack = new_stack();
        fibers[i].thread = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
        fibers[i].state = kReady;
        std::fill_n(fibers[i].warp_syncs, 32, uint64_t{0});
    }
}

void abandon_fibers() {
    for (Fiber& fiber : fibers) {
        fiber.started = false;
        ASAN_UNPOISON_MEMORY_REGION(fiber.stack, kStackBytes);
    }
}

size_t index_of(const Fiber& fiber) { return static_cast<size_t>(&fiber - fibers.data()); }

std::string name(uint3 index) {
    return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) + ")";
}

std::string name(const Fiber& fiber) {
    const std::string thread = "thread " + name(fiber.thread);
    const std::string place = std::string(fiber.site.file) + ":" + std::to_string(fiber.site.line);
    if (fiber.state == kEnded) return thread + " has ended";
    if (fiber.state == kAtBarrier) return thread + " waits for its block at " + place;
    char mask[16];
    snprintf(mask, sizeof(mask), "0x%08x", fiber.mask);
    return thread + " waits for lanes " + mask + " of its warp at " + place;
}

void report(const std::string& message) {
    if (error.empty()) error = "block " + name(blockIdx) + ": " + message;
}

bool same(Site a, Site b) { return a.line == b.line && strcmp(a.file, b.file) == 0; }

bool is_partner(const Fiber& fiber, size_t other) {
    return other < threads && (fiber.mask >> (other % 32) & 1) != 0 && fibers[other].state != kEnded;
}

// The lane that keeps a fiber from its exchange; null if all have come.
const Fiber* missing_partner(const Fiber& fiber) {
    const size_t warp = index_of(fiber) / 32 * 32;
    for (size_t i = warp; i < warp + 32; ++i) {
        if (!is_partner(fiber, i)) continue;
        const Fiber& other = fibers[i];
        if (other.state != kInExchange || other.kind != fiber.kind || other.mask != fiber.mask) return &other;
        if (!same(other.site, fiber.site)) return &other;
    }
    return nullptr;
}

// Orders what the lanes of `mask` did; one that has ended does no more.
void sync_lanes(size_t warp, unsigned mask) {
    uint64_t passed[32] = {};
    for (size_t i = warp; i < std::min(warp + 32, threads); ++i) {
        if ((mask >> (i - warp) & 1) == 0) continue;
        ++fibers[i].warp_syncs[i - warp];
        for (size_t lane = 0; lane < 32; ++lane) passed[lane] = std::max(passed[lane], fibers[i].warp_syncs[lane]);
    }
    for (size_t i = warp; i < std::min(warp + 32, threads); ++i) {
        if ((mask >> (i - warp) & 1) != 0) std::copy_n(passed, 32, fibers[i].warp_syncs);
    }
}

void complete_exchange(const Fiber& fiber) {
    const size_t warp = index_of(fiber) / 32 * 32;
    uint64_t votes = 0;
    for (size_t i = warp; i < warp + 32; ++i) {
        if (is_partner(fiber, i) && fibers[i].value != 0) votes |= uint64_t{1} << (i - warp);
    }
    if (fiber.kind == kSync) sync_lanes(warp, fiber.mask);
    for (size_t i = warp; i < warp + 32; ++i) {
        if (!is_partner(fiber, i)) continue;
        Fiber& lane = fibers[i];
        const size_t source = warp + static_cast<size_t>(lane.source);
        if (lane.kind == kShuffle && !is_partner(fiber, source)) {
            return report(name(lane) + ", to read lane " + std::to_string(lane.source) + ", which takes no part");
        }
        lane.result = lane.kind == kShuffle ? fibers[source].value : votes;
        lane.state = kReady;
    }
}

// All fibers wait or have ended: release some, or report why none can go on.
void release() {
    const Fiber *waiting = nullptr, *ended = nullptr;
    for (size_t i = 0; i < threads; ++i) {
        const Fiber& fiber = fibers[i];
        if (fiber.state == kEnded) ended = &fiber;
        if (fiber.state == kAtBarrier && waiting == nullptr) waiting = &fiber;
        if (fiber.state != kInExchange) continue;
        const Fiber* missing = missing_partner(fiber);
        if (missing == nullptr) return complete_exchange(fiber);
        return report(name(fiber) + ", but " + name(*missing));
    }
    if (ended != nullptr) return report(name(*waiting) + ", but " + name(*ended));
    for (size_t i = 0; i < threads; ++i) {
        if (!same(fibers[i].site, waiting->site)) return report(name(*waiting) + ", but " + name(fibers[i]));
    }
    for (size_t i = 0; i < threads; ++i) fibers[i].state = kReady;
    ++barriers;
}

std::vector<size_t> arranged(size_t count) {
    std::vector<size_t> turns(count);
    std::iota(turns.begin(), turns.end(), size_t{0});
    if (order == kReverse) std::reverse(turns.begin(), turns.end());
    if (order == kShuffled) std::shuffle(turns.begin(), turns.end(), dice);
    return turns;
}

void poison(SharedMemory& array) {
    memset(array.bytes.get(), 0xff, array.size);
    for (SharedMemory::Element& element : array.elements) {
        element.write = {};
        for (Reads& each : element.reads) each.lanes = 0;
    }
    array.address_taken = false;
}

void run_block() {
    start_fibers();
    barriers = 0;
    for (auto& [key, array] : arrays) poison(array);
    while (error.empty()) {
        bool moved = false, waits = false;
        for (const size_t i : arranged(threads)) {
            if (fibers[i].state == kReady) {
                resume(fibers[i]);
                if (!error.empty()) return;
                moved = true;
            }
            waits = waits || fibers[i].state != kEnded;
        }
        if (!waits) return;
        if (!moved) release();
    }
}

Access access_now() {
    const size_t thread = index_of(*current);
    return {static_cast<int>(thread), barriers, current->warp_syncs[thread % 32]};
}

void check_order(const SharedMemory& array, size_t index, const Access& before, const Access& now, const char* what) {
    if (before.thread < 0 || before.thread == now.thread || before.barriers != now.barriers) return;
    const bool one_warp = before.thread / 32 == now.thread / 32;
    if (one_warp && before.warp_syncs < current->warp_syncs[before.thread % 32]) return;
    fail(std::string("race on shared ") + array.name + "[" + std::to_string(index) + "]: " + what + " thread " +
         name(fibers[static_cast<size_t>(before.thread)].thread) + " with no barrier between");
}

}  // namespace

void fail(const std::string& message) {
    report("thread " + name(threadIdx) + ": " + message);
    suspend();
    __builtin_unreachable();
}

void barrier(Site site) {
    current->site = site;
    current->state = kAtBarrier;
    suspend();
}

uint64_t exchange(Site site, Exchange kind, unsigned mask, uint64_t value, int source) {
    Fiber& fiber = *current;
    fiber.site = site, fiber.kind = kind, fiber.mask = mask, fiber.value = value, fiber.source = source;
    fiber.state = kInExchange;
    if ((mask >> lane() & 1) == 0) fail(name(fiber) + ", which it is not one of");
    if (missing_partner(fiber) == nullptr) complete_exchange(fiber);
    if (fiber.state != kReady) suspend();
    return fiber.result;
}

void SharedMemory::check_read(size_t index) {
    if (address_taken) return;
    Element& element = elements[index];
    if (element.write.thread < 0) {
        fail(std::string("reads shared ") + name + "[" + std::to_string(index) + "], which no thread has written");
    }
    const Access now = access_now();
    check_order(*this, index, element.write, now, "it reads what was written by");
    if (element.reads.empty()) element.reads.resize((threads + 31) / 32);
    Reads& reads = element.reads[static_cast<size_t>(now.thread) / 32];
    if (reads.barriers != now.barriers) reads.barriers = now.barriers, reads.lanes = 0;
    reads.lanes |= 1u << now.thread % 32;
    reads.warp_syncs[now.thread % 32] = now.warp_syncs;
}

void SharedMemory::check_write(size_t index) {
    if (address_taken) return;
    Element& element = elements[index];
    const Access now = access_now();
    check_order(*this, index, element.write, now, "it writes what was written by");
    for (size_t warp = 0; warp < element.reads.size(); ++warp) {
        Reads& reads = element.reads[warp];
        for (unsigned lanes = reads.barriers == now.barriers ? reads.lanes : 0; lanes != 0; lanes &= lanes - 1) {
            const int lane = __builtin_ctz(lanes), thread = static_cast<int>(32 * warp) + lane;
            check_order(*this, index, {thread, reads.barriers, reads.warp_syncs[lane]}, now,
                        "it writes what was read by");
        }
        reads.lanes = 0;
    }
    element.write = now;
}

SharedMemory& shared_memory(const void* key, const char* name, size_t count, size_t element_size) {
    SharedMemory& array = arrays[key];
    if (array.name == nullptr) {
        array.name = name;
        array.size = count * element_size;
        array.bytes.reset(new unsigned char[array.size]);
        array.elements.resize(count);
        poison(array);
        size_t bytes = 0;
        for (const auto& [other, each] : arrays) bytes += each.size;
        if (bytes > kSharedBytes) fail("more than 48 KB of shared memory");
    }
    if (array.elements.size() != count) fail(std::string("shared ") + name + " was declared with another element type");
    return array;
}

int64_t run(dim3 grid, dim3 block, void (*body)(void*), void* context) {
    const size_t blocks = size_t{grid.x} * grid.y * grid.z;
    threads = size_t{block.x} * block.y * block.z;
    const bool grid_fits = blocks > 0 && grid.x <= 0x7fffffffu && grid.y <= 65535 && grid.z <= 65535;
    if (!grid_fits || threads == 0 || threads > 1024 || block.z > 64) return cudaErrorInvalidConfiguration;

    kernel_body = body, kernel_context = context;
    gridDim = grid, blockDim = block;
    dice.seed(seed);
    arrays.clear();
    for (const size_t i : arranged(blocks)) {
        blockIdx = {static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                    static_cast<unsigned>(i / grid.x / grid.y)};
        run_block();
        if (!error.empty()) {
            abandon_fibers();
            return -1;
        }
    }
    return cudaSuccess;
}

}  // namespace emulate

extern "C" {

// Where -fsanitize=alignment sends an access that a GPU would refuse, with the place in the source.
struct Misalignment {
    const char* file;
    uint32_t line;
};
__attribute__((visibility("hidden"))) void __ubsan_handle_type_mismatch_v1(const Misalignment* found, uintptr_t) {
    emulate::fail(std::string("misaligned access at ") + found->file + ":" + std::to_string(found->line));
}

// What build.py calls.

__attribute__((visibility("hidden"))) extern const fp::Kernel* const __start_fp_kernels[];
__attribute__((visibility("hidden"))) extern const fp::Kernel* const __stop_fp_kernels[];

__attribute__((visibility("default"))) const fp::Kernel* emulate_kernel(size_t index) {
    return __start_fp_kernels + index < __stop_fp_kernels ? __start_fp_kernels[index] : nullptr;
}

__attribute__((visibility("default"))) void emulate_set_schedule(int which, uint64_t new_seed) {
    emulate::order = static_cast<emulate::Order>(which);
    emulate::seed = new_seed;
}

// The kernel's status; if the emulation found a fault, `message` says which.
__attribute__((visibility("default"))) int64_t emulate_call(const fp::Kernel* kernel, const fp::Slot* arguments,
                                                            char* message, size_t message_bytes) {
    static std::mutex one_at_a_time;
    const std::lock_guard<std::mutex> lock(one_at_a_time);
    emulate::error.clear();
    const int64_t status = kernel->invoke(arguments);
    snprintf(message, message_bytes, "%s", emulate::error.c_str());
    return status;
}
}

// SPDX-License-Identifier: Apache-2.0
// fastprompt._C: shows the table of native kernels (common/kernel.h) to Python. Torch-free (torch_tensor.h), so one
// build serves every torch version. Adding an op does not touch this file.
#include <pybind11/pybind11.h>

#include <array>
#include <string>

#define FP_TARGET "bindings"
#include "common/kernel.h"
#include "describe.h"
#include "kernel_object.h"
#include "torch_tensor.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace py = pybind11;

// The linker marks both ends of the table.
extern "C" const fp::Kernel* const __start_fp_kernels[];  // NOLINT(bugprone-reserved-identifier)
extern "C" const fp::Kernel* const __stop_fp_kernels[];   // NOLINT(bugprone-reserved-identifier)

namespace {

#if defined(__x86_64__)
struct Registers {
    unsigned a, b, c, d;
};

// Zeros where the CPU knows no such leaf.
Registers cpuid(unsigned leaf, unsigned subleaf) {
    Registers x = {};
    __get_cpuid_count(leaf, subleaf, &x.a, &x.b, &x.c, &x.d);
    return x;
}

// Two names that older compilers' __builtin_cpu_supports does not know.
bool has_f16c() { return (cpuid(1, 0).c & 1U << 29) != 0; }
bool has_avx512_bf16() { return (cpuid(7, 1).a & 1U << 5) != 0; }

// Does the CPU multiply bf16 in tiles, and does the system, which must be asked once per process, let us?
bool may_use_amx() {
#if defined(__linux__)
    constexpr unsigned kAmxBf16 = 1U << 22, kAmxTile = 1U << 24;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // asm/prctl.h: ARCH_REQ_XCOMP_PERM; XFEATURE_XTILEDATA
    const unsigned features = cpuid(7, 0).d;
    if ((features & kAmxBf16) == 0 || (features & kAmxTile) == 0) return false;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}
#endif

bool runs_here(const std::string& target) {
#if defined(__x86_64__)
    if (target == "avx512_bf16") return runs_here("avx512") && has_avx512_bf16();
    if (target == "amx") return runs_here("avx512_bf16") && may_use_amx();
    if (target == "avx2") return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
    if (target == "avx512") {
        return runs_here("avx2") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    }
#endif
    return true;
}

bool made_by_amd() {
#if defined(__x86_64__)
    return __builtin_cpu_is("amd") != 0;
#else
    return false;
#endif
}

py::dict kernels(const std::string& target) {
    py::dict found;
    if (!runs_here(target)) return found;
    for (const fp::Kernel* const* entry = __start_fp_kernels; entry != __stop_fp_kernels; ++entry) {
        if (target != (*entry)->target) continue;
        PyObject* made = fp::kernel_object(**entry);
        if (made == nullptr) throw py::error_already_set();
        found[(*entry)->name] = py::reinterpret_steal<py::object>(made);
    }
    return found;
}

// Without pybind11, whose calls take longer than what this does.
std::array<PyMethodDef, 4> functions = {{
    {"describe", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(fp::describe)), METH_FASTCALL,
     "describe(*arguments) -> all of them but for what tensors hold, as bytes; None if one cannot be described."},
    {"learn_torch", fp::learn_torch, METH_O, "learn_torch(torch): kernels and describe take its tensors from then on."},
    {"record_calls", fp::record_calls, METH_O,
     "record_calls(list or None) -> what was given last: from then on this thread's calls of kernels are appended to "
     "the list, each as a function without arguments that makes it again, in the same memory, and its arguments."},
    {nullptr, nullptr, 0, nullptr},
}};

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.doc() = "fastprompt's native kernels, by target.";
    if (!fp::add_kernel_types(module.ptr())) throw py::error_already_set();
    module.def(
        "kernels", &kernels, py::arg("target"),
        "name -> kernel for 'scalar', 'neon', 'avx2', 'avx512', 'avx512_bf16', 'amx' or 'cuda'; empty where this "
        "build or this CPU has none.");
    module.attr("cpu_is_amd") = made_by_amd();
    if (PyModule_AddFunctions(module.ptr(), functions.data()) != 0) throw py::error_already_set();
}

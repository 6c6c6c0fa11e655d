// SPDX-License-Identifier: Apache-2.0
// fastprompt._C: shows the table of native kernels (common/kernel.h) to Python. Torch-free: it passes on pointers,
// sizes and numbers, so one build serves every torch version. Adding an op does not touch this file.
#include <pybind11/pybind11.h>

#include <array>
#include <stdexcept>
#include <string>

#define FP_TARGET "bindings"
#include "common/kernel.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#ifdef FP_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

namespace py = pybind11;

// The linker marks both ends of the table.
extern "C" const fp::Kernel* const __start_fp_kernels[];  // NOLINT(bugprone-reserved-identifier)
extern "C" const fp::Kernel* const __stop_fp_kernels[];   // NOLINT(bugprone-reserved-identifier)

namespace {

constexpr size_t kMaxArguments = 48;

[[noreturn]] void bad_arguments(const fp::Kernel& kernel, const std::string& what) {
    throw py::type_error(std::string("fastprompt._C.") + kernel.name + ": " + what + " (signature '" +
                         kernel.signature + "': p pointer, i integer, d float)");
}

[[noreturn]] void fail(PyObject* error, const fp::Kernel& kernel, const char* what) {
    PyErr_Format(error, "fastprompt::%s: %s", kernel.name, what);
    throw py::error_already_set();
}

int64_t call(const fp::Kernel& kernel, const py::args& args) {
    const std::string signature = kernel.signature;
    const size_t count = signature.size();
    if (args.size() != count || count > kMaxArguments) {
        bad_arguments(kernel, "takes " + std::to_string(count) + " arguments, got " + std::to_string(args.size()) +
                                  ". If the Python files are newer than this extension, build it again");
    }
    std::array<fp::Slot, kMaxArguments> slots;
    for (size_t i = 0; i < count; ++i) {
        PyObject* value = PyTuple_GET_ITEM(args.ptr(), static_cast<Py_ssize_t>(i));
        if (signature[i] == 'd') {
            slots[i].d = PyFloat_AsDouble(value);
        } else if (PyLong_Check(value)) {
            slots[i].i = PyLong_AsLongLong(value);
        } else {
            bad_arguments(kernel, "argument " + std::to_string(i) + " must be an int");
        }
        if (PyErr_Occurred() != nullptr) throw py::error_already_set();
    }
    int64_t status = 0;
    {
        const py::gil_scoped_release release;
        status = kernel.invoke(slots.data());
    }
    if (status == fp::kNoMemory) fail(PyExc_MemoryError, kernel, "no memory for its working space");
    if (status == fp::kBadOption) fail(PyExc_ValueError, kernel, "the kernel does not know this dtype or option");
#ifdef FP_WITH_CUDA
    if (status != 0 && std::string(kernel.target) == "cuda") {
        throw std::runtime_error(std::string("fastprompt::") + kernel.name +
                                 ": CUDA error: " + cudaGetErrorString(static_cast<cudaError_t>(status)));
    }
#endif
    return status;
}

// Asked of CPUID, as older compilers' __builtin_cpu_supports does not know the name.
bool has_avx512_bf16() {
#if defined(__x86_64__)
    constexpr unsigned kAvx512Bf16 = 1U << 5;  // CPUID 7.1, eax
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a & kAvx512Bf16) != 0;
#else
    return false;
#endif
}

// Does the CPU multiply bf16 in tiles, and does the system, which must be asked once per process, let us?
bool may_use_amx() {
#if defined(__x86_64__) && defined(__linux__)
    constexpr unsigned kAmxBf16 = 1U << 22, kAmxTile = 1U << 24;  // CPUID 7.0, edx
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // asm/prctl.h: ARCH_REQ_XCOMP_PERM; XFEATURE_XTILEDATA
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d & kAmxBf16) == 0 || (d & kAmxTile) == 0) return false;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}

bool runs_here(const std::string& target) {
#if defined(__x86_64__)
    if (target == "avx512_bf16") return runs_here("avx512") && has_avx512_bf16();
    if (target == "amx") return runs_here("avx512_bf16") && may_use_amx();
    if (target == "avx2") {
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    }
    if (target == "avx512") {
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
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
        if (target == (*entry)->target) found[(*entry)->name] = py::cast(*entry, py::return_value_policy::reference);
    }
    return found;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.doc() = "fastprompt's native kernels, by target.";
    py::class_<fp::Kernel>(module, "Kernel")
        .def("__call__", &call)
        .def_property_readonly("name", [](const fp::Kernel& kernel) { return kernel.name; })
        .def_property_readonly("target", [](const fp::Kernel& kernel) { return kernel.target; })
        .def_property_readonly("signature", [](const fp::Kernel& kernel) { return kernel.signature; });
    module.def(
        "kernels", &kernels, py::arg("target"),
        "name -> kernel for 'scalar', 'neon', 'avx2', 'avx512', 'avx512_bf16', 'amx' or 'cuda'; empty where this "
        "build or this CPU has none.");
    module.attr("cpu_is_amd") = made_by_amd();
}

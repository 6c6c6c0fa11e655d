// SPDX-License-Identifier: Apache-2.0
// fastprompt._C: shows the table of native kernels (common/kernel.h) to Python. Torch-free (torch_tensor.h), so one
// build serves every torch version. Adding an op does not touch this file.
#include <pybind11/pybind11.h>
#include <structmember.h>

#include <array>
#include <cstddef>
#include <cstring>
#include <string>

#define FP_TARGET "bindings"
#include "common/kernel.h"
#include "describe.h"
#include "torch_tensor.h"

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

// A kernel as Python calls it, by the protocol that costs least: kernel(*arguments).
struct KernelObject {
    PyObject_HEAD;
    vectorcallfunc call;
    fp::Kernel kernel;
};

bool refuse(const fp::Kernel& kernel, const char* what, size_t number) {
    PyErr_Format(PyExc_TypeError,
                 "fastprompt._C.%s: %s %zu (signature '%s': t tensor or None, p the same or an address, i integer, "
                 "d float)",
                 kernel.name, what, number, kernel.signature);
    return false;
}

// The argument as a kernel reads it. `tensor` is where its description stays during the call.
bool read_argument(const fp::Kernel& kernel, size_t i, PyObject* value, fp::TorchTensor& tensor, fp::Slot& slot) {
    const char letter = kernel.signature[i];
    if (letter == 'd') {
        slot.d = PyFloat_AsDouble(value);
        return PyErr_Occurred() == nullptr;
    }
    if (letter == 'i' || (letter == 'p' && PyLong_Check(value))) {
        if (!PyLong_Check(value)) return refuse(kernel, "there must be an int as argument", i);
        slot.i = PyLong_AsLongLong(value);
        return PyErr_Occurred() == nullptr;
    }
    if (value == Py_None) {
        slot.i = 0;
        return true;
    }
    if (!fp::is_tensor(value)) return refuse(kernel, "there must be a tensor or None as argument", i);
    if (!fp::read_tensor(value, tensor)) return false;
    slot.i = reinterpret_cast<int64_t>(letter == 't' ? &tensor.tensor : tensor.tensor.data);
    return true;
}

PyObject* fail(PyObject* error, const fp::Kernel& kernel, const char* what) {
    return PyErr_Format(error, "fastprompt::%s: %s", kernel.name, what);
}

PyObject* call(PyObject* self, PyObject* const* arguments, size_t count_and_flag, PyObject* names) {
    const fp::Kernel& kernel = reinterpret_cast<KernelObject*>(self)->kernel;
    const auto count = static_cast<size_t>(PyVectorcall_NARGS(count_and_flag));
    const size_t expected = std::strlen(kernel.signature);
    if (count != expected || count > kMaxArguments || names != nullptr) {
        return PyErr_Format(PyExc_TypeError,
                            "fastprompt._C.%s: takes %zu arguments, got %zu. If the Python files are newer than this "
                            "extension, build it again",
                            kernel.name, expected, count + (names == nullptr ? 0 : PyTuple_GET_SIZE(names)));
    }
    std::array<fp::TorchTensor, kMaxArguments> tensors;
    std::array<fp::Slot, kMaxArguments> slots;
    for (size_t i = 0; i < count; ++i) {
        if (!read_argument(kernel, i, arguments[i], tensors[i], slots[i])) return nullptr;
    }
    int64_t status = 0;
    Py_BEGIN_ALLOW_THREADS;
    status = kernel.invoke(slots.data());
    Py_END_ALLOW_THREADS;
    if (status == fp::kNoMemory) return fail(PyExc_MemoryError, kernel, "no memory for its working space");
    if (status == fp::kBadOption) {
        return fail(PyExc_ValueError, kernel, "the kernel does not know this dtype or option");
    }
#ifdef FP_WITH_CUDA
    if (status != 0 && std::strcmp(kernel.target, "cuda") == 0) {
        return PyErr_Format(PyExc_RuntimeError, "fastprompt::%s: CUDA error: %s", kernel.name,
                            cudaGetErrorString(static_cast<cudaError_t>(status)));
    }
#endif
    return PyLong_FromLongLong(status);
}

std::array<PyMemberDef, 5> kernel_members = {{
    {"name", T_STRING, offsetof(KernelObject, kernel.name), READONLY, nullptr},
    {"target", T_STRING, offsetof(KernelObject, kernel.target), READONLY, nullptr},
    {"signature", T_STRING, offsetof(KernelObject, kernel.signature), READONLY, nullptr},
    {"__vectorcalloffset__", T_PYSSIZET, offsetof(KernelObject, call), READONLY, nullptr},
    {nullptr, 0, 0, 0, nullptr},
}};

std::array<PyType_Slot, 3> kernel_slots = {{
    {Py_tp_members, kernel_members.data()},
    {Py_tp_call, reinterpret_cast<void*>(PyVectorcall_Call)},
    {0, nullptr},
}};

PyType_Spec kernel_spec = {"fastprompt._C.Kernel", sizeof(KernelObject), 0,
                           Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL | Py_TPFLAGS_DISALLOW_INSTANTIATION,
                           kernel_slots.data()};

PyObject* kernel_type = nullptr;

py::object kernel_object(const fp::Kernel& kernel) {
    auto* made = PyObject_New(KernelObject, reinterpret_cast<PyTypeObject*>(kernel_type));
    if (made == nullptr) throw py::error_already_set();
    made->call = &call;
    made->kernel = kernel;
    return py::reinterpret_steal<py::object>(reinterpret_cast<PyObject*>(made));
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
        if (target == (*entry)->target) found[(*entry)->name] = kernel_object(**entry);
    }
    return found;
}

// Without pybind11, whose calls take longer than what this does.
std::array<PyMethodDef, 3> functions = {{
    {"describe", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(fp::describe)), METH_FASTCALL,
     "describe(*arguments) -> all of them but for what tensors hold, as bytes; None if one cannot be described."},
    {"learn_torch", fp::learn_torch, METH_O, "learn_torch(torch): kernels and describe take its tensors from then on."},
    {nullptr, nullptr, 0, nullptr},
}};

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.doc() = "fastprompt's native kernels, by target.";
    kernel_type = PyType_FromSpec(&kernel_spec);
    if (kernel_type == nullptr) throw py::error_already_set();
    module.attr("Kernel") = py::handle(kernel_type);
    module.def(
        "kernels", &kernels, py::arg("target"),
        "name -> kernel for 'scalar', 'neon', 'avx2', 'avx512', 'avx512_bf16', 'amx' or 'cuda'; empty where this "
        "build or this CPU has none.");
    module.attr("cpu_is_amd") = made_by_amd();
    if (PyModule_AddFunctions(module.ptr(), functions.data()) != 0) throw py::error_already_set();
}

// SPDX-License-Identifier: Apache-2.0
#include <Python.h>
#include <structmember.h>

#include <array>
#include <cstddef>
#include <cstring>

#define FP_TARGET "bindings"
#include "kernel_object.h"
#include "torch_tensor.h"

#ifdef FP_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

namespace {

constexpr size_t kMaxArguments = 48;

// A kernel as Python calls it, by the protocol that costs least: kernel(*arguments).
struct KernelObject {
    PyObject_HEAD;
    vectorcallfunc call;
    fp::Kernel kernel;
};

// A call that was recorded: call() makes it again, on the memory that the tensors had, which somebody must keep.
struct CallObject {
    PyObject_HEAD;
    vectorcallfunc call;
    fp::Kernel kernel;
    fp::Slot* slots;  // the first of a block of memory, see copied()
};

PyObject *kernel_type = nullptr, *call_type = nullptr;

thread_local PyObject* recorded = nullptr;  // the list for calls of this thread's

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

PyObject* run(const fp::Kernel& kernel, const fp::Slot* slots) {
    int64_t status = 0;
    Py_BEGIN_ALLOW_THREADS;
    status = kernel.invoke(slots);
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

PyObject* run_again(PyObject* self, PyObject* const* /*arguments*/, size_t count_and_flag, PyObject* names) {
    const auto& call = *reinterpret_cast<CallObject*>(self);
    if (PyVectorcall_NARGS(count_and_flag) != 0 || names != nullptr) {
        PyErr_SetString(PyExc_TypeError, "fastprompt._C.Call: takes no arguments");
        return nullptr;
    }
    PyObject* status = run(call.kernel, call.slots);
    if (status == nullptr || PyObject_IsTrue(status) == 0) return status;
    Py_DECREF(status);
    return fail(PyExc_IndexError, call.kernel, "an index is out of range");
}

// The arguments of a call as its kernel reads them, in one block: slots, which point to tensors, which point to shapes
// and strides. Null, with a Python exception set, if there is no memory. No vectors: their functions would be weak.
fp::Slot* copied(const fp::Kernel& kernel, const fp::TorchTensor* tensors, const fp::Slot* slots) {
    const size_t count = std::strlen(kernel.signature);
    const auto is_tensor = [&](size_t i) { return kernel.signature[i] == 't' && slots[i].i != 0; };
    size_t numbers = 0;
    for (size_t i = 0; i < count; ++i) numbers += is_tensor(i) ? 2 * static_cast<size_t>(tensors[i].tensor.dims) : 0;
    void* block = PyMem_Malloc(count * (sizeof(fp::Slot) + sizeof(fp::Tensor)) + numbers * sizeof(int64_t));
    if (block == nullptr) {
        PyErr_NoMemory();
        return nullptr;
    }
    auto* made = static_cast<fp::Slot*>(block);
    auto* next = reinterpret_cast<fp::Tensor*>(made + count);
    auto* sizes = reinterpret_cast<int64_t*>(next + count);
    for (size_t i = 0; i < count; ++i) {
        made[i] = slots[i];
        if (!is_tensor(i)) continue;
        const fp::Tensor& t = tensors[i].tensor;
        const auto dims = static_cast<size_t>(t.dims);
        std::memcpy(sizes, t.shape, dims * sizeof(int64_t));
        std::memcpy(sizes + dims, t.strides, dims * sizeof(int64_t));
        *next = {t.data, t.dims, sizes, sizes + dims};
        made[i].i = reinterpret_cast<int64_t>(next++);
        sizes += 2 * dims;
    }
    return made;
}

// (a Call, its arguments) to the list.
bool record(const fp::Kernel& kernel, PyObject* const* given, const fp::TorchTensor* tensors, const fp::Slot* slots) {
    auto* made = PyObject_New(CallObject, reinterpret_cast<PyTypeObject*>(call_type));
    if (made == nullptr) return false;
    made->call = &run_again;
    made->kernel = kernel;
    made->slots = copied(kernel, tensors, slots);
    const auto count = static_cast<Py_ssize_t>(std::strlen(kernel.signature));
    PyObject* arguments = made->slots == nullptr ? nullptr : PyTuple_New(count);
    for (Py_ssize_t i = 0; arguments != nullptr && i < count; ++i) PyTuple_SET_ITEM(arguments, i, Py_NewRef(given[i]));
    PyObject* entry = arguments == nullptr ? nullptr : PyTuple_Pack(2, made, arguments);
    const bool done = entry != nullptr && PyList_Append(recorded, entry) == 0;
    Py_XDECREF(entry);
    Py_XDECREF(arguments);
    Py_DECREF(reinterpret_cast<PyObject*>(made));
    return done;
}

void forget_call(PyObject* self) {
    PyTypeObject* type = Py_TYPE(self);
    PyMem_Free(reinterpret_cast<CallObject*>(self)->slots);
    PyObject_Free(self);
    Py_DECREF(type);
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
    PyObject* status = run(kernel, slots.data());
    if (status == nullptr || recorded == nullptr || record(kernel, arguments, tensors.data(), slots.data())) {
        return status;
    }
    Py_DECREF(status);
    return nullptr;
}

std::array<PyMemberDef, 5> kernel_members = {{
    {"name", T_STRING, offsetof(KernelObject, kernel.name), READONLY, nullptr},
    {"target", T_STRING, offsetof(KernelObject, kernel.target), READONLY, nullptr},
    {"signature", T_STRING, offsetof(KernelObject, kernel.signature), READONLY, nullptr},
    {"__vectorcalloffset__", T_PYSSIZET, offsetof(KernelObject, call), READONLY, nullptr},
    {nullptr, 0, 0, 0, nullptr},
}};

std::array<PyMemberDef, 3> call_members = {{
    {"name", T_STRING, offsetof(CallObject, kernel.name), READONLY, nullptr},
    {"__vectorcalloffset__", T_PYSSIZET, offsetof(CallObject, call), READONLY, nullptr},
    {nullptr, 0, 0, 0, nullptr},
}};

std::array<PyType_Slot, 3> kernel_slots = {{
    {Py_tp_members, kernel_members.data()},
    {Py_tp_call, reinterpret_cast<void*>(PyVectorcall_Call)},
    {0, nullptr},
}};

std::array<PyType_Slot, 4> call_slots = {{
    {Py_tp_members, call_members.data()},
    {Py_tp_call, reinterpret_cast<void*>(PyVectorcall_Call)},
    {Py_tp_dealloc, reinterpret_cast<void*>(forget_call)},
    {0, nullptr},
}};

constexpr unsigned kFlags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL | Py_TPFLAGS_DISALLOW_INSTANTIATION;

PyType_Spec kernel_spec = {"fastprompt._C.Kernel", sizeof(KernelObject), 0, kFlags, kernel_slots.data()};
PyType_Spec call_spec = {"fastprompt._C.Call", sizeof(CallObject), 0, kFlags, call_slots.data()};

}  // namespace

namespace fp {

bool add_kernel_types(PyObject* module) {
    kernel_type = PyType_FromSpec(&kernel_spec);
    call_type = PyType_FromSpec(&call_spec);
    return kernel_type != nullptr && call_type != nullptr &&
           PyModule_AddObjectRef(module, "Kernel", kernel_type) == 0 &&
           PyModule_AddObjectRef(module, "Call", call_type) == 0;
}

PyObject* kernel_object(const Kernel& kernel) {
    auto* made = PyObject_New(KernelObject, reinterpret_cast<PyTypeObject*>(kernel_type));
    if (made == nullptr) return nullptr;
    made->call = &call;
    made->kernel = kernel;
    return reinterpret_cast<PyObject*>(made);
}

PyObject* record_calls(PyObject* /*module*/, PyObject* list) {
    if (list != Py_None && !PyList_Check(list)) {
        PyErr_SetString(PyExc_TypeError, "fastprompt._C.record_calls: takes a list or None");
        return nullptr;
    }
    PyObject* before = recorded == nullptr ? Py_NewRef(Py_None) : recorded;
    recorded = list == Py_None ? nullptr : Py_NewRef(list);
    return before;
}

}  // namespace fp

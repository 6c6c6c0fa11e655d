// SPDX-License-Identifier: Apache-2.0
#define FP_TARGET "bindings"
#include "torch_tensor.h"

#include <initializer_list>

namespace {

// The part of DLPack's ABI that is read here: https://dmlc.github.io/dlpack/latest/c_api.html
struct DLTensor {
    void* data;
    int32_t device_type, device_id;
    int32_t dims;
    uint8_t kind, bits;
    uint16_t lanes;
    int64_t *shape, *strides;
    uint64_t byte_offset;
};

struct ExchangeApi {
    uint32_t major, minor;
    void* previous;
    void* allocate;
    void* managed_from_object;
    void* managed_to_object;
    int (*tensor_from_object)(void* object, DLTensor* out);  // borrows the object's shape and strides
    void* current_stream;
};

constexpr uint32_t kMajor = 1;

struct Torch {
    PyTypeObject *tensor, *parameter, *dtype;
    PyObject *dispatch_keys, *raw_repr;
    const ExchangeApi* api;
};

Torch torch{};  // for as long as the process lives

// owner.name, then .name of that, ...; null, without an exception, where there is none.
PyObject* attribute(PyObject* owner, std::initializer_list<const char*> names) {
    Py_INCREF(owner);
    for (const char* name : names) {
        PyObject* found = PyObject_GetAttrString(owner, name);
        Py_DECREF(owner);
        owner = found;
        if (owner == nullptr) {
            PyErr_Clear();
            break;
        }
    }
    return owner;
}

const ExchangeApi* exchange_api(PyObject* module) {
    PyObject* capsule = attribute(module, {"Tensor", "__dlpack_c_exchange_api__"});
    if (capsule == nullptr) return nullptr;
    const auto* api = static_cast<const ExchangeApi*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
    Py_DECREF(capsule);
    PyErr_Clear();
    return api != nullptr && api->major == kMajor && api->tensor_from_object != nullptr ? api : nullptr;
}

}  // namespace

namespace fp {

bool is_tensor(PyObject* value) { return torch.tensor != nullptr && PyObject_TypeCheck(value, torch.tensor) != 0; }

bool is_plain_tensor(PyObject* value) { return Py_TYPE(value) == torch.tensor || Py_TYPE(value) == torch.parameter; }

bool is_dtype(PyObject* value) { return Py_TYPE(value) == torch.dtype; }

bool read_tensor(PyObject* value, TorchTensor& found) {
    DLTensor t;
    if (torch.api->tensor_from_object(value, &t) != 0) return false;
    found = {{static_cast<char*>(t.data) + t.byte_offset, t.dims, t.shape, t.strides},
             t.device_type,
             t.device_id,
             t.kind,
             t.bits};
    return true;
}

bool read_keys(PyObject* value, uint64_t& keys) {
    PyObject* set = PyObject_CallOneArg(torch.dispatch_keys, value);
    if (set == nullptr) return false;
    PyObject* raw = PyObject_CallMethodNoArgs(set, torch.raw_repr);
    Py_DECREF(set);
    if (raw == nullptr) return false;
    keys = PyLong_AsUnsignedLongLong(raw);
    Py_DECREF(raw);
    return PyErr_Occurred() == nullptr;
}

PyObject* learn_torch(PyObject* /*module*/, PyObject* module) {
    const Torch found = {reinterpret_cast<PyTypeObject*>(attribute(module, {"Tensor"})),
                         reinterpret_cast<PyTypeObject*>(attribute(module, {"nn", "Parameter"})),
                         reinterpret_cast<PyTypeObject*>(attribute(module, {"dtype"})),
                         attribute(module, {"_C", "_dispatch_keys"}),
                         PyUnicode_InternFromString("raw_repr"),
                         exchange_api(module)};
    if (found.tensor == nullptr || found.parameter == nullptr || found.dtype == nullptr ||
        found.dispatch_keys == nullptr || found.raw_repr == nullptr || found.api == nullptr) {
        PyErr_SetString(PyExc_ImportError, "this PyTorch does not share its tensors by DLPack 1's exchange protocol");
        return nullptr;
    }
    torch = found;
    Py_RETURN_NONE;
}

}  // namespace fp

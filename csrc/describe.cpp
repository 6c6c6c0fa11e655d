// SPDX-License-Identifier: Apache-2.0
#define FP_TARGET "bindings"
#include "describe.h"

#include <array>
#include <cstring>

#include "torch_tensor.h"

namespace {

// Each value follows a letter for its kind, so no two lists of arguments have the same bytes.
class Description {
public:
    // False of an argument that cannot be described, perhaps with a Python exception set.
    bool add(PyObject* value) {
        const PyTypeObject* type = Py_TYPE(value);
        if (value == Py_None) return put('N');
        if (fp::is_plain_tensor(value)) return add_tensor(value);
        if (type == &PyBool_Type) return put(value == Py_True ? 'T' : 'F');
        if (type == &PyLong_Type) return add_int(value);
        if (type == &PyFloat_Type) return put('f') && put(PyFloat_AS_DOUBLE(value));
        if (type == &PyUnicode_Type) return add_string(value);
        if (fp::is_dtype(value))
            return put('d') && put(reinterpret_cast<uintptr_t>(value));  // there is one of each, for ever
        return type == &PyList_Type && add_list(value);
    }

    PyObject* bytes() const { return PyBytes_FromStringAndSize(text_.data(), static_cast<Py_ssize_t>(size_)); }

private:
    template <typename T>
    bool put(T value) {
        return put(&value, sizeof value);
    }

    bool put(const void* values, size_t size) {
        if (size > text_.size() - size_) return false;
        std::memcpy(text_.data() + size_, values, size);
        size_ += size;
        return true;
    }

    bool add_tensor(PyObject* value) {
        fp::TorchTensor found;
        uint64_t keys = 0;
        if (!fp::read_keys(value, keys) || !fp::read_tensor(value, found)) return false;
        const fp::Tensor& t = found.tensor;
        const size_t size = static_cast<size_t>(t.dims) * sizeof(int64_t);
        return put('t') && put(keys) && put(found.device_type) && put(found.device_id) && put(found.kind) &&
               put(found.bits) && put(t.dims) && put(t.shape, size) && put(t.strides, size);
    }

    bool add_int(PyObject* value) {
        const long long number = PyLong_AsLongLong(value);
        return (number != -1 || PyErr_Occurred() == nullptr) && put('i') && put(number);
    }

    bool add_string(PyObject* value) {
        Py_ssize_t size = 0;
        const char* text = PyUnicode_AsUTF8AndSize(value, &size);
        return text != nullptr && put('s') && put(size) && put(text, static_cast<size_t>(size));
    }

    bool add_list(PyObject* value) {
        const Py_ssize_t size = PyList_GET_SIZE(value);
        if (!put('[') || !put(size)) return false;
        for (Py_ssize_t i = 0; i < size; ++i) {
            if (!add(PyList_GET_ITEM(value, i))) return false;
        }
        return true;
    }

    std::array<char, 2048> text_;  // some 20 tensors
    size_t size_ = 0;
};

}  // namespace

namespace fp {

PyObject* describe(PyObject* /*module*/, PyObject* const* arguments, Py_ssize_t count) {
    Description found;
    for (Py_ssize_t i = 0; i < count; ++i) {
        if (found.add(arguments[i])) continue;
        PyErr_Clear();
        Py_RETURN_NONE;
    }
    return found.bytes();
}

}  // namespace fp

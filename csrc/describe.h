// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <Python.h>

namespace fp {

// describe(*arguments) -> bytes: of each tensor its dispatch keys, dtype, device, shape and strides; of None, numbers,
// strings and dtypes the value; lists item by item. Two calls of one description differ in what their tensors hold
// alone. None where an argument is something else, such as a subclass of Tensor.
PyObject* describe(PyObject* module, PyObject* const* arguments, Py_ssize_t count);

}  // namespace fp

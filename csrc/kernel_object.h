// SPDX-License-Identifier: Apache-2.0
// Native kernels as Python calls them, kernel(*arguments), and calls that are made again as they were.
#pragma once
#include <Python.h>

#include "common/kernel.h"

namespace fp {

// Adds Kernel and Call to the module. False, with a Python exception set, if that fails.
bool add_kernel_types(PyObject* module);

PyObject* kernel_object(const Kernel& kernel);

// record_calls(list or None), see bindings.cpp.
PyObject* record_calls(PyObject* module, PyObject* list);

}  // namespace fp

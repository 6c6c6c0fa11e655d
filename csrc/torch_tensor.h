// SPDX-License-Identifier: Apache-2.0
// PyTorch's tensors, read without PyTorch's headers: through the table of functions that it shares with other libraries
// (DLPack's exchange protocol), so that one build serves all its versions.
#pragma once
#include <Python.h>

#include <cstdint>

#include "common/kernel.h"

namespace fp {

struct TorchTensor {
    Tensor tensor;
    int32_t device_type, device_id;
    uint8_t kind, bits;  // the dtype
};

bool is_tensor(PyObject* value);

// Of no subclass but Parameter?
bool is_plain_tensor(PyObject* value);

// False, with a Python exception set, of a tensor without memory of its own: a fake, meta or sparse one.
bool read_tensor(PyObject* value, TorchTensor& found);

// All that matters of a tensor beside its device: the bits of torch._C._dispatch_keys.
bool read_keys(PyObject* value, uint64_t& keys);

bool is_dtype(PyObject* value);

// learn_torch(torch): before, nothing is a tensor. ImportError of a PyTorch with another protocol.
PyObject* learn_torch(PyObject* module, PyObject* torch);

}  // namespace fp

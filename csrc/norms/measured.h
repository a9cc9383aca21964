// Whether gradients are still those that were measured, from Python.
#pragma once

#include <Python.h>

namespace qwen_fused {

// list of tensors or None -> a capsule that knows them and their versions, and holds none of them alive
PyObject* remember_gradients(PyObject* module, PyObject* gradients);

// (capsule, list as long as its own) -> place of the first tensor there that is another, or was written to; -1
PyObject* first_changed_gradient(PyObject* module, PyObject* const* arguments, Py_ssize_t count);

}  // namespace qwen_fused

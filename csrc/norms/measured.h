// Gradients of many parameters from Python: found, measured, scaled, and known again.
#pragma once

#include <Python.h>

namespace qwen_fused {

// (list of parameters, rows over it, inv_scale: number, tensor or None) -> (values, counts) of group_grad_norm over
// those that have a gradient; None where there is none, or one that Python has to look at
PyObject* measure_gradients(PyObject* module, PyObject* const* arguments, Py_ssize_t count);

// (list of parameters, rows over it, values, list of bounds, their tensor or None) -> whether group_grad_clip_ scaled
PyObject* clip_gradients(PyObject* module, PyObject* const* arguments, Py_ssize_t count);

// list of parameters -> a capsule that knows their gradients and the versions of these, and holds none of them alive
PyObject* remember_gradients(PyObject* module, PyObject* parameters);

// (capsule, list of the same parameters) -> place of the first whose gradient is another, or was written to; -1
PyObject* first_changed_gradient(PyObject* module, PyObject* const* arguments, Py_ssize_t count);

}  // namespace qwen_fused

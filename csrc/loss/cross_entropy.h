// The direct way to the cross-entropy, from Python.
#pragma once

#include <Python.h>

namespace qwen_fused {

// (logits, target, class_weight, hard_floor, hard_mode, ignore_index) -> what the fields of EFEOutput hold, or
// None where anything about the call is not plain, or not right: the way through checks and the op has it then
PyObject* hard_cell_cross_entropy_direct(PyObject* module, PyObject* const* arguments, Py_ssize_t count);

}  // namespace qwen_fused

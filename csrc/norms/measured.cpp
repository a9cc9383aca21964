// What Python asks about the gradients of thousands of parameters, in C++: there, to find them takes as long as to
// measure them, to hand them to an op half of that, and to ask for their versions a fifth.
#include "measured.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/util/intrusive_ptr.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <memory>
#include <optional>
#include <tuple>
#include <vector>

namespace qwen_fused {
namespace {

constexpr const char* NAME = "qwen_fused.measured_gradients";

using OptionalTensor = std::optional<at::Tensor>;

Py_ssize_t size_of(PyObject* parameters) {
  TORCH_CHECK_TYPE(PyList_Check(parameters), "parameters must be a list, got ", Py_TYPE(parameters)->tp_name);
  return PyList_GET_SIZE(parameters);
}

const at::Tensor& parameter_at(PyObject* parameters, Py_ssize_t place) {
  PyObject* const parameter = PyList_GET_ITEM(parameters, place);
  TORCH_CHECK_TYPE(THPVariable_Check(parameter), "parameters must be tensors, got ", Py_TYPE(parameter)->tp_name);
  return THPVariable_Unpack(parameter);
}

const at::Tensor& gradient_of(PyObject* parameters, Py_ssize_t place) { return parameter_at(parameters, place).grad(); }

// numbers in memory: no subclass, wrapper, other layout or lazy sign
bool is_plain(const at::Tensor& gradient) {
  using Key = c10::DispatchKey;
  constexpr c10::DispatchKeySet usual(
      {Key::CPU, Key::CUDA, Key::ADInplaceOrView, Key::AutogradCPU, Key::AutogradCUDA, Key::AutocastCPU,
       Key::AutocastCUDA});
  return usual.isSupersetOf(gradient.key_set());
}

struct Gathered {
  std::vector<at::Tensor> gradients;
  std::vector<int64_t> rows, position;
};

// The gradients there are, rows over them, and their places where one is missing. Nothing where all are missing, or one
// is for Python to look at; so is a parameter whose class, or a mode, wants to see what is asked of it, and one on the
// meta device that has no gradient.
std::optional<Gathered> gathered(PyObject* parameters, PyObject* rows) {
  const Py_ssize_t count = size_of(parameters);
  if (at::impl::torch_function_mode_enabled()) return {};
  Gathered found;
  found.gradients.reserve(count);
  // how many there are before each place
  std::vector<int64_t> before{0};
  before.reserve(count + 1);
  for (Py_ssize_t i = 0; i < count; ++i) {
    const at::Tensor& parameter = parameter_at(parameters, i);
    const at::Tensor& gradient = parameter.grad();
    if (!gradient.defined() && parameter.is_meta()) return {};
    if (gradient.defined()) {
      if (!is_plain(gradient) || !THPVariable_CheckExact(PyList_GET_ITEM(parameters, i))) return {};
      found.gradients.push_back(gradient);
    }
    before.push_back(static_cast<int64_t>(found.gradients.size()));
  }
  const auto all = static_cast<int64_t>(count);
  if (before[all] == 0) return {};
  found.rows = pybind11::handle(rows).cast<std::vector<int64_t>>();
  if (before[all] == all) return found;
  for (size_t i = 0; i < found.rows.size(); ++i) {
    TORCH_CHECK_VALUE(
        0 <= found.rows[i] && found.rows[i] <= all, "rows must lie within the ", all, " parameters, got ",
        found.rows[i]);
    // the third of three is where a row's parameters begin, and stays
    if (i % 3 != 2) found.rows[i] = before[found.rows[i]];
  }
  for (int64_t i = 0; i < all; ++i) {
    if (before[i] < before[i + 1]) found.position.push_back(i);
  }
  return found;
}

template <class F>
c10::TypedOperatorHandle<F> op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<F>();
}

// weak, so that no later tensor has the address of one that is gone
struct Seen {
  c10::weak_intrusive_ptr<c10::TensorImpl> tensor{c10::intrusive_ptr<c10::TensorImpl>()};
  uint32_t version = 0;
};

// inference tensors have none, and are written to nowhere else
uint32_t version_of(c10::TensorImpl* x) { return x->is_inference() ? 0 : x->version_counter().current_version(); }

}  // namespace

PyObject* measure_gradients(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  using Measure = std::tuple<at::Tensor, at::Tensor>(
      at::TensorList, at::IntArrayRef, at::IntArrayRef, double, const OptionalTensor&);
  static const auto measure = op<Measure>("qwen_fused::group_grad_norm");
  TORCH_CHECK_TYPE(count == 3, "expected 3 arguments, got ", count);
  const auto found = gathered(arguments[0], arguments[1]);
  if (!found) Py_RETURN_NONE;
  double inv_scale = 1.0;
  OptionalTensor inv_scale_tensor;
  if (THPVariable_Check(arguments[2])) {
    inv_scale_tensor = THPVariable_Unpack(arguments[2]);
  } else if (arguments[2] != Py_None) {
    inv_scale = PyFloat_AsDouble(arguments[2]);
    if (PyErr_Occurred() != nullptr) throw python_error();
  }
  std::tuple<at::Tensor, at::Tensor> measured;
  try {
    const pybind11::gil_scoped_release others_may_run;
    measured = measure.call(found->gradients, found->rows, found->position, inv_scale, inv_scale_tensor);
  } catch (const c10::NotImplementedError&) {
    // a device without a kernel: the reference measures there, or refuses in words
    Py_RETURN_NONE;
  }
  return pybind11::cast(measured).release().ptr();
  END_HANDLE_TH_ERRORS
}

PyObject* clip_gradients(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  using Clip = void(at::TensorList, at::IntArrayRef, const at::Tensor&, at::ArrayRef<double>, const OptionalTensor&);
  static const auto clip = op<Clip>("qwen_fused::group_grad_clip_");
  TORCH_CHECK_TYPE(count == 5, "expected 5 arguments, got ", count);
  const auto found = gathered(arguments[0], arguments[1]);
  if (!found) Py_RETURN_FALSE;
  TORCH_CHECK_TYPE(THPVariable_Check(arguments[2]), "values must be a tensor");
  const at::Tensor& values = THPVariable_Unpack(arguments[2]);
  const auto numbers = pybind11::handle(arguments[3]).cast<std::vector<double>>();
  OptionalTensor bounds;
  if (THPVariable_Check(arguments[4])) bounds = THPVariable_Unpack(arguments[4]);
  try {
    const pybind11::gil_scoped_release others_may_run;
    clip.call(found->gradients, found->rows, values, numbers, bounds);
  } catch (const c10::NotImplementedError&) {
    Py_RETURN_FALSE;
  }
  Py_RETURN_TRUE;
  END_HANDLE_TH_ERRORS
}

PyObject* remember_gradients(PyObject*, PyObject* parameters) {
  HANDLE_TH_ERRORS
  auto seen = std::make_unique<std::vector<Seen>>(size_of(parameters));
  for (size_t i = 0; i < seen->size(); ++i) {
    c10::TensorImpl* const tensor = gradient_of(parameters, static_cast<Py_ssize_t>(i)).unsafeGetTensorImpl();
    if (tensor == c10::UndefinedTensorImpl::singleton()) continue;
    // one count, where a weak pointer made of a strong one takes three
    c10::raw::weak_intrusive_ptr::incref(tensor);
    (*seen)[i] = {c10::weak_intrusive_ptr<c10::TensorImpl>::reclaim(tensor), version_of(tensor)};
  }
  PyObject* const capsule = PyCapsule_New(seen.get(), NAME, [](PyObject* capsule) {
    delete static_cast<std::vector<Seen>*>(PyCapsule_GetPointer(capsule, NAME));
  });
  if (capsule == nullptr) throw python_error();
  seen.release();
  return capsule;
  END_HANDLE_TH_ERRORS
}

PyObject* first_changed_gradient(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 2, "expected 2 arguments, got ", count);
  const auto* const seen = static_cast<std::vector<Seen>*>(PyCapsule_GetPointer(arguments[0], NAME));
  if (seen == nullptr) throw python_error();
  TORCH_CHECK_VALUE(
      size_of(arguments[1]) == static_cast<Py_ssize_t>(seen->size()), "parameters must be as many as measured");
  for (size_t i = 0; i < seen->size(); ++i) {
    c10::TensorImpl* const now = gradient_of(arguments[1], static_cast<Py_ssize_t>(i)).unsafeGetTensorImpl();
    const Seen& then = (*seen)[i];
    // what is gone is not scaled either
    if (now == c10::UndefinedTensorImpl::singleton()) continue;
    if (then.tensor._unsafe_get_target() != now || then.version != version_of(now)) return PyLong_FromSize_t(i);
  }
  return PyLong_FromLong(-1);
  END_HANDLE_TH_ERRORS
}

}  // namespace qwen_fused

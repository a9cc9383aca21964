// The cross-entropy alone. On the cells of a few small grids the loss takes 3 µs, and what torch does around an op ten
// times that: fifteen arguments from Python, the dispatcher for each tensor, and checks and outputs of terms that are
// off. So plain tensors, which the dispatcher has nothing to do for, go to the passes directly.
#include "cross_entropy.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/empty.h>
#include <ATen/record_function.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <tuple>

#include "efe_cpu.h"
#include "efe_ops.h"

namespace qwen_fused {

struct Options {
  double hard_floor;
  int64_t hard_mode, ignore_index;
};

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Key = c10::DispatchKey;
using Six = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

const OptionalTensor NONE;

// no subclass, wrapper, lazy sign or tangent: nothing but numbers in memory, and a gradient
bool is_plain(In x) {
  constexpr c10::DispatchKeySet usual({Key::CPU, Key::ADInplaceOrView, Key::AutogradCPU, Key::AutocastCPU});
  return x.defined() && usual.isSupersetOf(x.key_set()) && x.layout() == at::kStrided &&
         !x._fw_grad(/*level=*/0).defined();
}

// no mode, transform or trace that wants to see each op, and a graph that may be written
bool is_plain_here() {
  constexpr c10::DispatchKeySet usual({Key::BackendSelect, Key::ADInplaceOrView});
  const auto tls = c10::impl::tls_local_dispatch_key_set();
  return usual.isSupersetOf(tls.included_) && !tls.excluded_.has(Key::AutogradCPU) &&
         !at::impl::torch_function_mode_enabled();
}

Arguments arguments_of(In logits, In target, MaybeIn class_weight, const Options& o) {
  return {logits,       target, NONE,     NONE,       NONE,         NONE,        NONE,          NONE,
          class_weight, NONE,   CE_ALONE, CE_WEIGHTS, o.hard_floor, o.hard_mode, o.ignore_index};
}

}  // namespace

// what a node is made of besides the logits, and what forward gave
struct Call {
  const at::Tensor& target;
  const OptionalTensor& class_weight;
  Options options;
  ForwardResult result;
};

// a node with one edge
struct HardCellCrossEntropy : torch::autograd::Function<HardCellCrossEntropy> {
  static at::Tensor forward(AutogradContext* ctx, In logits, Call* call) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const Options& o = call->options;
    ForwardResult& r = call->result;
    r = efe_forward(arguments_of(logits, call->target, call->class_weight, o));
    const at::Tensor class_weight = call->class_weight.value_or(at::Tensor());
    ctx->saved_data["ignore_index"] = o.ignore_index;
    if (o.hard_mode == HARD_CELL) {
      ctx->saved_data["hard_floor"] = o.hard_floor;
      ctx->save_for_backward({logits, call->target, class_weight, r.coef, r.predicted});
    } else {
      // the rest is in coef; predicted is not saved: whoever called may then write into it
      ctx->save_for_backward({logits, call->target, class_weight, r.coef});
    }
    ctx->set_materialize_grads(false);
    return r.loss;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list gradients(2);
    if (!grads[0].defined()) return gradients;
    const variable_list s = ctx->get_saved_variables();
    const bool cell = s.size() == 5;
    const OptionalTensor class_weight = s[2].defined() ? OptionalTensor(s[2]) : std::nullopt;
    const OptionalTensor predicted = cell ? OptionalTensor(s[4]) : std::nullopt;
    const at::Tensor& coef = s[3];
    const Options o{
        cell ? ctx->saved_data["hard_floor"].toDouble() : 0, cell ? HARD_CELL : HARD_NONE,
        ctx->saved_data["ignore_index"].toInt()};
    const Needs needs{true};
    const bool direct = !at::GradMode::is_enabled() && is_plain_here() && is_plain(grads[0]) && is_plain(s[0]) &&
                        is_plain(s[1]) && is_plain(coef) && (!class_weight || is_plain(*class_weight)) &&
                        (!predicted || is_plain(*predicted));
    if (direct) {
      const at::AutoDispatchBelowADInplaceOrView below;
      const at::Tensor off;
      const Arguments a = arguments_of(s[0], s[1], class_weight, o);
      gradients[0] = std::get<0>(efe_backward(a, {grads[0], predicted, coef, off, off, off}, needs));
      return gradients;
    }
    const int64_t classes = Axes(s[0]).C;
    const auto empty = [&](at::IntArrayRef shape) { return at::empty(shape, coef.options()); };
    gradients[0] = std::get<0>(backward_op().call(
        grads[0], s[0], s[1], NONE, NONE, NONE, NONE, NONE, NONE, class_weight, NONE, predicted, coef,
        empty({0, 1, classes}), empty({0}), empty({0, classes}), CE_ALONE, CE_WEIGHTS, o.hard_floor, o.hard_mode,
        o.ignore_index, needs));
    return gradients;
  }
};

namespace {

// past the dispatcher, for tensors that are plain and fit each other
Six direct(In logits, In target, MaybeIn class_weight, const Options& o) {
  RECORD_FUNCTION("qwen_fused::hard_cell_cross_entropy", c10::ArrayRef<const c10::IValue>());
  Call call{target, class_weight, o, {}};
  ForwardResult& r = call.result;
  if (at::GradMode::is_enabled() && logits.requires_grad()) {
    r.loss = HardCellCrossEntropy::apply(logits, &call);
  } else {
    const at::AutoDispatchBelowADInplaceOrView below;
    r = efe_forward(arguments_of(logits, target, class_weight, o));
  }
  const auto column = [&](int64_t k) {
    return at::native::as_strided_tensorimpl(r.terms, {r.terms.size(0)}, {TERMS + 2}, k);
  };
  return {r.loss, column(CE), column(TERMS), column(TERMS + 1), r.solved, r.predicted};
}

// the op, of any tensors; its node is that of efe_loss
Six dispatched(In logits, In target, MaybeIn class_weight, double hard_floor, int64_t hard_mode, int64_t ignore_index) {
  const auto [loss, terms, solved, predicted, coef, d_pooled, d_obs_entropy, d_prompt_colors] = forward_op().call(
      logits, target, NONE, NONE, NONE, NONE, NONE, NONE, class_weight, NONE, CE_ALONE, CE_WEIGHTS, hard_floor,
      hard_mode, ignore_index);
  return {loss, terms.select(1, CE), terms.select(1, TERMS), terms.select(1, TERMS + 1), solved, predicted};
}

bool is_float(In x) {
  const auto type = x.scalar_type();
  return type == at::kFloat || type == at::kDouble || type == at::kHalf || type == at::kBFloat16;
}

bool is_integer(In x) { return at::isIntegralType(x.scalar_type(), /*includeBool=*/false); }

// what the checks in Python let through, of what is common
bool fits(In logits, In target, MaybeIn class_weight) {
  const int64_t d = logits.dim();
  if (!is_float(logits) || !is_integer(target) || (d != 2 && d != 4)) return false;
  const int64_t classes = logits.size(1);
  if (classes < 1 || classes > MAX_CLASSES || target.dim() != d - 1 || target.size(0) != logits.size(0)) return false;
  if (d == 4 && (target.size(1) != logits.size(2) || target.size(2) != logits.size(3))) return false;
  return !class_weight || (is_float(*class_weight) && class_weight->dim() == 1 && class_weight->size(0) == classes &&
                           !class_weight->requires_grad());
}

std::optional<Options> options_of(PyObject* hard_floor, PyObject* hard_mode, PyObject* ignore_index) {
  constexpr std::array<const char*, 3> modes{"episode", "cell", "none"};
  if (!PyFloat_CheckExact(hard_floor) || !PyUnicode_CheckExact(hard_mode) || !PyLong_CheckExact(ignore_index))
    return {};
  Options o{PyFloat_AS_DOUBLE(hard_floor), 0, 0};
  int overflow = 0;
  o.ignore_index = PyLong_AsLongLongAndOverflow(ignore_index, &overflow);
  while (o.hard_mode < 3 && PyUnicode_CompareWithASCIIString(hard_mode, modes[o.hard_mode]) != 0) ++o.hard_mode;
  if (overflow != 0 || o.hard_mode == 3 || !(o.hard_floor >= 0 && o.hard_floor <= 1)) return {};
  return o;
}

pybind11::object wrapped(In x) { return pybind11::reinterpret_steal<pybind11::object>(THPVariable_Wrap(x)); }

}  // namespace

PyObject* hard_cell_cross_entropy_direct(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 6, "expected 6 arguments, got ", count);
  if (!THPVariable_CheckExact(arguments[0]) || !THPVariable_CheckExact(arguments[1]) || !is_plain_here()) {
    Py_RETURN_NONE;
  }
  const at::Tensor &logits = THPVariable_Unpack(arguments[0]), &target = THPVariable_Unpack(arguments[1]);
  OptionalTensor class_weight;
  if (arguments[2] != Py_None) {
    if (!THPVariable_CheckExact(arguments[2])) Py_RETURN_NONE;
    class_weight = THPVariable_Unpack(arguments[2]);
    if (!is_plain(*class_weight)) Py_RETURN_NONE;
  }
  const auto options = options_of(arguments[3], arguments[4], arguments[5]);
  if (!options || !is_plain(logits) || !is_plain(target) || !fits(logits, target, class_weight)) Py_RETURN_NONE;
  Six found;
  {
    const pybind11::gil_scoped_release others_may_run;
    found = direct(logits, target, class_weight, *options);
  }
  auto& [loss, ce, hard, accuracy, solved, predicted] = found;
  const pybind11::object ratio = wrapped(hard);
  pybind11::dict terms;
  terms["ce"] = wrapped(ce), terms["hard"] = ratio;
  return pybind11::make_tuple(wrapped(loss), terms, ratio, wrapped(accuracy), wrapped(solved), wrapped(predicted))
      .release()
      .ptr();
  END_HANDLE_TH_ERRORS
}

TORCH_LIBRARY_IMPL(qwen_fused, CompositeImplicitAutograd, m) { m.impl("hard_cell_cross_entropy", &dispatched); }

}  // namespace qwen_fused

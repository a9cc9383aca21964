// The derivative of the loss as a node of torch's graph. In C++, as a node in Python takes longer than the loss of a
// few small grids.
#include <ATen/FuncTorchTLS.h>
#include <c10/core/AutogradState.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <array>
#include <tuple>
#include <vector>

#include "efe_arguments.h"
#include "efe_ops.h"

namespace qwen_fused {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// saved behind the tensors that forward was given
enum Place { PREDICTED = 10, COEF, D_POOLED, D_OBS_ENTROPY, D_PROMPT_COLORS };

// tensors among the arguments of forward, and the places of those that have a gradient
inline constexpr size_t TENSORS = 10, ARGUMENTS = 15;
inline constexpr Needs::size_type DIFFERENTIABLE[] = {0, 2, 3, 5, 6};

// past the graph
template <class Op, class... Arguments>
auto call_below(const Op& op, const Arguments&... arguments) {
  const at::AutoDispatchBelowAutograd below;
  return op.call(arguments...);
}

variable_list listed(Five&& five) {
  return std::apply([](auto&&... x) { return variable_list{std::move(x)...}; }, std::move(five));
}

}  // namespace

// the two nodes, with names to be read in a graph
struct EfeLoss : torch::autograd::Function<EfeLoss> {
  // what the op returns besides the loss has no gradient, and passes the graph by in `all`
  static at::Tensor forward(
      AutogradContext* ctx, In plan, In target, MaybeIn back, MaybeIn preference, MaybeIn anchor, MaybeIn obs_entropy,
      MaybeIn prompt_colors, MaybeIn step_weight, MaybeIn class_weight, MaybeIn annealed, const On& on, Weights weights,
      double hard_floor, int64_t hard_mode, int64_t ignore_index, Eight* all) {
    *all = call_below(
        forward_op(), plan, target, back, preference, anchor, obs_entropy, prompt_colors, step_weight, class_weight,
        annealed, on, weights, hard_floor, hard_mode, ignore_index);
    const auto& [loss, terms, solved, predicted, coef, d_pooled, d_obs_entropy, d_prompt_colors] = *all;
    const auto value = [](MaybeIn x) { return x.value_or(at::Tensor()); };
    // in other modes predicted is of no use, and not saved: whoever called may then write into it
    ctx->save_for_backward(
        {plan, target, value(back), value(preference), value(anchor), value(obs_entropy), value(prompt_colors),
         value(step_weight), value(class_weight), value(annealed), hard_mode == HARD_CELL ? predicted : at::Tensor(),
         coef, d_pooled, d_obs_entropy, d_prompt_colors});
    // one entry for all but what a double may not hold: each costs a string
    std::vector<double> numbers(weights.begin(), weights.end());
    numbers.insert(numbers.end(), on.begin(), on.end());
    numbers.insert(numbers.end(), {hard_floor, static_cast<double>(hard_mode)});
    ctx->saved_data["numbers"] = numbers;
    ctx->saved_data["ignore_index"] = ignore_index;
    ctx->set_materialize_grads(false);
    return loss;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list gradients(ARGUMENTS + 1);
    if (!grads[0].defined()) return gradients;
    const variable_list s = ctx->get_saved_variables();
    // the node has edges to those tensors alone that are there
    std::array<bool, TENSORS> wanted{};
    for (size_t place = 0, edge = 0; place < TENSORS; ++place) {
      wanted[place] = s[place].defined() && ctx->needs_input_grad(edge++);
    }
    Needs needs;
    for (size_t k = 0; k < needs.size(); ++k) needs[k] = wanted[DIFFERENTIABLE[k]];
    const auto optional = [&](size_t place) { return s[place].defined() ? OptionalTensor(s[place]) : std::nullopt; };
    const std::vector<double> numbers = ctx->saved_data["numbers"].toDoubleVector();
    const at::ArrayRef<double> weights(numbers.data(), TERMS);
    On on;
    for (size_t k = 0; k < on.size(); ++k) on[k] = numbers[TERMS + k] != 0;
    const variable_list found = listed(
        backward_op().call(
            grads[0], s[0], s[1], optional(2), optional(3), optional(4), optional(5), optional(6), optional(7),
            optional(8), optional(9), optional(PREDICTED), s[COEF], s[D_POOLED], s[D_OBS_ENTROPY], s[D_PROMPT_COLORS],
            on, weights, numbers[2 * TERMS], static_cast<int64_t>(numbers[2 * TERMS + 1]),
            ctx->saved_data["ignore_index"].toInt(), needs));
    // what no term reads has no gradient, but an empty tensor
    const Needs read{true, on[AGREEMENT], on[RISK] || on[ANCHOR], on[AMBIGUITY], on[PROMPT]};
    for (size_t k = 0; k < needs.size(); ++k) {
      if (needs[k] && read[k]) gradients[DIFFERENTIABLE[k]] = found[k];
    }
    return gradients;
  }
};

struct EfeLossBackward : torch::autograd::Function<EfeLossBackward> {
  template <class... Arguments>
  static variable_list forward(AutogradContext*, const Arguments&... arguments) {
    return listed(call_below(backward_op(), arguments...));
  }

  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK(
        false,
        "efe_loss has no second derivative in its fused backends: use backend='reference', or drop create_graph=True");
  }
};

namespace {

bool has_gradient(In x) { return x.defined() && x.requires_grad(); }
bool has_gradient(MaybeIn x) { return x && has_gradient(*x); }
template <class Other>
bool has_gradient(const Other&) {
  return false;
}

// what the op refuses with a better word than a node has for it
bool is_refused(In x) { return !x.defined() || x.is_nested(); }
bool is_refused(MaybeIn x) { return x && is_refused(*x); }
template <class Other>
bool is_refused(const Other&) {
  return false;
}

bool has_tangent(In x) { return x.defined() && x._fw_grad(/*level=*/0).defined(); }
bool has_tangent(MaybeIn x) { return x && has_tangent(*x); }
template <class Other>
bool has_tangent(const Other&) {
  return false;
}

#define QF_USE_THE_PUBLIC "call qwen_fused.efe_loss, which has it, or use backend='reference'"

// what a node would get wrong without a word: the public function finds these before
template <class... Arguments>
void refuse_tangents(const Arguments&... arguments) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      !c10::AutogradState::get_tls_state().get_fw_grad_mode() || !(has_tangent(arguments) || ...),
      "efe_loss has no forward-mode derivative as an op: " QF_USE_THE_PUBLIC);
}

void refuse_functorch() {
  const auto& functorch = at::functorch::functorchTLSAccessor();
  if (!functorch) return;
  try {
    functorch->checkSupportsCppAutogradFunction();
  } catch (const c10::Error&) {
    TORCH_CHECK_NOT_IMPLEMENTED(false, "efe_loss has no derivative for torch.func as an op: " QF_USE_THE_PUBLIC);
  }
}

template <class... Arguments>
bool wants_node(const Arguments&... arguments) {
  return at::GradMode::is_enabled() && (has_gradient(arguments) || ...) && !(is_refused(arguments) || ...);
}

// functions of exactly the types of a schema
template <class Op>
struct Typed;
template <class... Arguments>
struct Typed<Eight(Arguments...)> {
  static Eight apply(Arguments... arguments) {
    refuse_tangents(arguments...);
    if (!wants_node(arguments...)) return call_below(forward_op(), arguments...);
    refuse_functorch();
    Eight all;
    std::get<0>(all) = EfeLoss::apply(arguments..., &all);
    return all;
  }
};
template <class... Arguments>
struct Typed<Five(Arguments...)> {
  static Five apply(Arguments... arguments) {
    refuse_tangents(arguments...);
    if (!wants_node(arguments...)) return call_below(backward_op(), arguments...);
    refuse_functorch();
    const variable_list five = EfeLossBackward::apply(arguments...);
    return {five[0], five[1], five[2], five[3], five[4]};
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(qwen_fused, Autograd, m) {
  m.impl("efe_loss", &Typed<Forward>::apply);
  m.impl("efe_loss_backward", &Typed<Backward>::apply);
}

}  // namespace qwen_fused

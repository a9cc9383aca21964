// The loss's two ops as C++ calls them, through the dispatcher.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

#include <array>

#include "efe_arguments.h"
#include "efe_cpu.h"

namespace qwen_fused {

using In = const at::Tensor&;
using MaybeIn = const OptionalTensor&;
using Weights = at::ArrayRef<double>;
using Forward = Eight(
    In, In, MaybeIn, MaybeIn, MaybeIn, MaybeIn, MaybeIn, MaybeIn, MaybeIn, MaybeIn, const On&, Weights, double, int64_t,
    int64_t);
using Backward = Five(
    In, In, In, MaybeIn, MaybeIn, MaybeIn, MaybeIn, MaybeIn, MaybeIn, MaybeIn, MaybeIn, MaybeIn, In, In, In, In,
    const On&, Weights, double, int64_t, int64_t, const Needs&);

inline const auto& forward_op() {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("qwen_fused::efe_loss", "").typed<Forward>();
  return op;
}

inline const auto& backward_op() {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("qwen_fused::efe_loss_backward", "").typed<Backward>();
  return op;
}

// the cross-entropy alone, as a set of terms and their weights
inline constexpr On CE_ALONE{true};
inline constexpr double CE_WEIGHTS[TERMS] = {1.0};

}  // namespace qwen_fused

// The two passes on the CPU, below the dispatcher: what the ops call, and what a small call takes the direct way to.
#pragma once

#include <ATen/core/Tensor.h>

#include "efe_arguments.h"

namespace qwen_fused {

// d_* of a term that is off is undefined
struct ForwardResult {
  at::Tensor loss, terms, solved, predicted, coef, d_pooled, d_obs_entropy, d_prompt_colors;
};

// of what forward returned, and the upstream factor, which has one element; d_* as there, or empty
struct Saved {
  const at::Tensor& grad;
  const OptionalTensor& predicted;
  const at::Tensor &coef, &d_pooled, &d_obs_entropy, &d_prompt_colors;
};

// whether plan, back, preference, obs_entropy and prompt_colors want their gradient
using Needs = std::array<bool, 5>;

ForwardResult efe_forward(const Arguments& a);

// undefined where not needed, or read by no term; saved is what forward gave for the same arguments, unchecked
Five efe_backward(const Arguments& a, const Saved& saved, const Needs& needs);

}  // namespace qwen_fused

// What both directions of the loss ask of their arguments, and the job that the tiles get.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

#include "efe_job.h"

namespace qwen_fused {

using OptionalTensor = std::optional<at::Tensor>;
// what the ops return
using Eight =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using Five = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
// which terms count, by enum Term: whoever calls decides
using On = std::array<bool, TERMS>;

struct Arguments {
  const at::Tensor &plan, &target;
  const OptionalTensor &back, &preference, &anchor, &obs_entropy, &prompt_colors, &step_weight, &class_weight,
      &annealed;
  const On& on;
  at::ArrayRef<double> weights;
  double hard_floor;
  int64_t hard_mode, ignore_index;
};

inline void check_dense(const char* name, const at::Tensor& x) {
  TORCH_CHECK_VALUE(x.defined(), name, " must be a dense tensor on the CPU, got None");
  TORCH_CHECK_VALUE(
      x.layout() == at::kStrided && !x.is_nested() && x.is_cpu(), name, " must be a dense tensor on the CPU, got ",
      x.is_nested() ? "a nested tensor" : c10::str("layout ", x.layout()), " on ", x.device());
}

inline void check(const char* name, const OptionalTensor& x, at::IntArrayRef shape) {
  if (!x) return;
  check_dense(name, *x);
  TORCH_CHECK_VALUE(x->sizes() == shape, name, " must be ", shape, ", got ", x->sizes());
  const auto type = x->scalar_type();
  TORCH_CHECK_VALUE(
      type == at::kFloat || type == at::kDouble || type == at::kHalf || type == at::kBFloat16, name,
      " must be float16, bfloat16, float32 or float64, got ", type);
}

inline void check_there(bool on, const char* name, const OptionalTensor& x, const char* term) {
  TORCH_CHECK_VALUE(!on || x, name, " must be there where the term ", term, " is on, got None");
}

// of a plan [B, T, C, H, W]; of [B, C, H, W], which is one step; of [N, C], which is one episode of N cells
struct Axes {
  int64_t B, T, C, H, W;
  explicit Axes(const at::Tensor& plan) {
    const auto sizes = plan.sizes();
    if (sizes.size() == 2) {
      B = 1, T = 1, C = sizes[1], H = sizes[0], W = 1;
    } else {
      B = sizes[0], T = sizes.size() == 5 ? sizes[1] : 1;
      C = sizes[sizes.size() - 3], H = sizes[sizes.size() - 2], W = sizes.back();
    }
  }
};

inline void check(const Arguments& a) {
  check_dense("plan", a.plan);
  check_dense("target", a.target);
  const int64_t d = a.plan.dim();
  TORCH_CHECK_VALUE(
      d == 5 || d == 4 || d == 2, "plan must be [B, T, C, H, W], [B, C, H, W] or [N, C], got ", a.plan.sizes());
  const auto [B, T, C, H, W] = Axes(a.plan);
  TORCH_CHECK_VALUE(T >= 1, "plan must have at least one step, got ", a.plan.sizes());
  TORCH_CHECK_VALUE(C >= 1 && C <= MAX_CLASSES, "plan must have 1 to ", MAX_CLASSES, " classes, got ", C);
  const bool fits = d == 2 ? a.target.sizes() == at::IntArrayRef({H}) : a.target.sizes() == at::IntArrayRef({B, H, W});
  TORCH_CHECK_VALUE(fits, "target must be ", d == 2 ? "[N]" : "[B, H, W]", ", got ", a.target.sizes());
  const auto type = a.target.scalar_type();
  TORCH_CHECK_VALUE(
      type == at::kByte || type == at::kChar || type == at::kShort || type == at::kInt || type == at::kLong,
      "target must be an integer tensor of 8 to 64 bits, got ", type);
  TORCH_CHECK_VALUE(a.weights.size() == TERMS, "weights must hold ", int(TERMS), " numbers, got ", a.weights.size());
  TORCH_CHECK_VALUE(
      a.hard_mode >= HARD_EPISODE && a.hard_mode <= HARD_NONE, "hard_mode must be 0, 1 or 2, got ", a.hard_mode);
  check("plan", a.plan, a.plan.sizes());
  check("back", a.back, a.plan.sizes());
  check("preference", a.preference, {B, C, H, W});
  check("anchor", a.anchor, {C, H, W});
  check("obs_entropy", a.obs_entropy, {C});
  check("prompt_colors", a.prompt_colors, {B, C});
  check("step_weight", a.step_weight, {T});
  check("class_weight", a.class_weight, {C});
  check("annealed", a.annealed, {TERMS + 1});
  TORCH_CHECK_VALUE(
      !a.annealed || a.annealed->scalar_type() == at::kDouble, "annealed must be float64, got ",
      a.annealed->scalar_type());
  check_there(a.on[RISK] || a.on[ANCHOR], "preference", a.preference, "risk or anchor");
  check_there(a.on[AMBIGUITY], "obs_entropy", a.obs_entropy, "ambiguity");
  check_there(a.on[AGREEMENT], "back", a.back, "agreement");
  check_there(a.on[ANCHOR], "anchor", a.anchor, "anchor");
  check_there(a.on[PROMPT], "prompt_colors", a.prompt_colors, "prompt");
}

// accumulate in float64: only inputs that may have a gradient decide, as in the reference's accumulate_dtype
inline bool any_double(const Arguments& a) {
  const auto is_double = [](const OptionalTensor& x) { return x && x->scalar_type() == at::kDouble; };
  return is_double(a.plan) || is_double(a.back) || is_double(a.preference) || is_double(a.obs_entropy) ||
         is_double(a.prompt_colors);
}

inline Type type_of(const at::Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat: return Type::f32;
    case at::kDouble: return Type::f64;
    case at::kHalf: return Type::f16;
    case at::kBFloat16: return Type::bf16;
    case at::kByte: return Type::u8;
    case at::kChar: return Type::i8;
    case at::kShort: return Type::i16;
    case at::kInt: return Type::i32;
    default: return Type::i64;
  }
}

// [B, T, C, H, W], or without those of its first three axes that it is said not to have
inline Strided strided(const at::Tensor& x, bool has_b, bool has_t, bool has_c) {
  const int64_t d = x.dim(), H = x.size(d - 2), W = x.size(d - 1);
  Strided s;
  s.data = x.data_ptr(), s.type = type_of(x), s.width = W;
  s.stride_b = has_b ? x.stride(0) : 0, s.stride_t = has_t ? x.stride(1) : 0, s.stride_c = has_c ? x.stride(d - 3) : 0;
  s.classes = has_c ? x.size(d - 3) : 1;
  s.stride_h = x.stride(d - 2), s.stride_w = x.stride(d - 1);
  // one axis of cells where the canvas allows it
  if (W == 1) s.stride_w = s.stride_h;
  s.flat = W == 1 || H == 1 || s.stride_h == s.stride_w * W;
  return s;
}

// the same of a plan, its twin or its gradient in any of their shapes
inline Strided strided_plan(const at::Tensor& x) {
  if (x.dim() > 2) return strided(x, true, x.dim() == 5, true);
  Strided s;
  s.data = x.data_ptr(), s.type = type_of(x), s.classes = x.size(1);
  s.stride_c = x.stride(1), s.stride_h = s.stride_w = x.stride(0);
  return s;
}

inline Strided strided_target(const at::Tensor& x) {
  if (x.dim() == 3) return strided(x, true, false, false);
  Strided s;
  s.data = x.data_ptr(), s.type = type_of(x), s.classes = 1;
  s.stride_h = s.stride_w = x.stride(0);
  return s;
}

// small arguments, in the accumulating type and contiguous; they live as long as the call
template <class T>
struct Small {
  at::Tensor tensor;
  explicit Small(const OptionalTensor& x) {
    if (x) tensor = x->to(c10::CppTypeToScalarType<T>::value).contiguous();
  }
  const T* data() const { return tensor.defined() ? tensor.template const_data_ptr<T>() : nullptr; }
};

template <class T>
struct Smalls {
  Small<T> obs_entropy, step_weight, class_weight, prompt_colors;
  explicit Smalls(const Arguments& a)
      : obs_entropy(a.obs_entropy),
        step_weight(a.step_weight),
        class_weight(a.class_weight),
        prompt_colors(a.prompt_colors) {}
};

template <class T>
Job<T> make_job(const Arguments& a, const Smalls<T>& small) {
  Job<T> job{};
  const Axes axes(a.plan);
  job.B = axes.B, job.steps = axes.T, job.classes = axes.C, job.cells = axes.H * axes.W;
  job.tiles = (job.cells + TILE - 1) / TILE;
  job.on = a.on;
  const at::Tensor annealed = a.annealed ? a.annealed->contiguous() : at::Tensor();
  const double* const weights = a.annealed ? annealed.const_data_ptr<double>() : a.weights.data();
  for (int k = 0; k < TERMS; ++k) job.weight[k] = weights[k];
  job.target = strided_target(a.target);
  job.plan = strided_plan(a.plan);
  if (job.on[AGREEMENT]) job.back = strided_plan(*a.back);
  if (job.on[RISK] || job.on[ANCHOR]) job.preference = strided(*a.preference, true, false, true);
  if (job.on[ANCHOR]) job.anchor = strided(*a.anchor, false, false, true);
  job.obs_entropy = small.obs_entropy.data();
  job.step_weight = small.step_weight.data(), job.class_weight = small.class_weight.data();
  job.hard_floor = a.annealed ? weights[TERMS] : a.hard_floor, job.hard_mode = static_cast<int>(a.hard_mode),
  job.ignore_index = a.ignore_index;
  return job;
}

}  // namespace qwen_fused

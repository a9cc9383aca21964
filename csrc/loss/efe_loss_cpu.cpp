// The expected-free-energy loss on the CPU: one threaded pass over the logits forward and one backward. Formulas, edge
// rules and names are those of kernels/reference.py; efe_tiles.cpp has the arithmetic.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <tuple>
#include <vector>

#include "../common/turns.h"
#include "efe_arguments.h"
#include "efe_cpu.h"
#include "efe_finish.h"
#include "efe_job.h"

namespace qwen_fused {
namespace {

// this thread's, kept from call to call: for a few cells, to get and to give back 40 KiB takes longer than the loss
void* scratch_of(int64_t bytes) {
  thread_local c10::DataPtr kept;
  thread_local int64_t size = 0;
  if (size < bytes) {
    kept = c10::GetCPUAllocator()->allocate(bytes);
    size = bytes;
  }
  return kept.get();
}

// calls work(unit, scratch) for every tile of every episode; a thread takes an episode's together while there are many
template <class T, class Work>
void each_tile(const Job<T>& job, const Work& work) {
  const int64_t units = job.B * job.tiles;
  // tiles a thread should have at least, so that starting it pays
  const int64_t grain = std::max<int64_t>(1, (1 << 15) / (TILE * job.classes * job.steps));
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), (units + grain - 1) / grain);
  in_turns(units, threads, job.tiles, [&](const auto& take) {
    T* const scratch = static_cast<T*>(scratch_of(job.scratch_size() * sizeof(T)));
    for (int64_t begin, end; take(begin, end);) {
      for (int64_t unit = begin; unit < end; ++unit) work(unit, scratch);
    }
  });
}

[[noreturn]] void refuse_target(const Arguments& a, int64_t bad) {
  const at::Tensor target = a.target.to(at::kLong).contiguous();
  const int64_t* const o = target.const_data_ptr<int64_t>();
  const int64_t classes = Axes(a.plan).C;
  int64_t found = 0;
  for (int64_t i = target.numel() - 1; i >= 0; --i) {
    if (o[i] != a.ignore_index && (o[i] < 0 || o[i] >= classes)) found = o[i];
  }
  C10_THROW_ERROR(
      ValueError, c10::str(
                      "target must be in [0, ", classes, ") or ignore_index ", a.ignore_index, ", got ", found, " (",
                      bad, " cells outside)"));
}

template <class T>
ForwardResult forward_as(const Arguments& a) {
  const Smalls<T> small(a);
  Job<T> job = make_job<T>(a, small);
  const int64_t size = job.slot_size();
  ForwardResult out;
  out.predicted = at::empty(a.target.sizes(), at::kByte);
  job.predicted = out.predicted.template data_ptr<uint8_t>();

  std::vector<double> slots(job.B * job.tiles * size);
  const auto tile = tile_functions<T>().forward;
  each_tile(job, [&](int64_t unit, T* scratch) { tile(job, unit, scratch, slots.data() + unit * size); });

  // one slot per episode, in order
  std::vector<double> sums(job.B * size);
  double bad = 0;
  for (int64_t b = 0; b < job.B; ++b) {
    for (int64_t tile = 0; tile < job.tiles; ++tile) {
      const double* const slot = slots.data() + (b * job.tiles + tile) * size;
      for (int64_t k = 0; k < size; ++k) sums[b * size + k] += slot[k];
    }
    bad += sums[b * size + S_BAD];
  }
  if (bad > 0) refuse_target(a, static_cast<int64_t>(bad));
  finish(job, sums, small.prompt_colors.data(), out);
  return out;
}

// as forward returned them for the same arguments
template <class T>
void check_saved_as(const Arguments& a, const Saved& saved) {
  const auto [B, steps, C, H, W] = Axes(a.plan);
  const auto like_forward = [](const char* name, const at::Tensor& x, at::IntArrayRef shape) {
    check(name, x, shape);
    const auto type = c10::CppTypeToScalarType<T>::value;
    TORCH_CHECK_VALUE(x.scalar_type() == type, name, " must be ", type, " as forward returned it, got ", x.dtype());
  };
  like_forward("coef", saved.coef, {B + 1, 2});
  like_forward("d_pooled", saved.d_pooled, {a.on[PROMPT] ? B : 0, steps, C});
  like_forward("d_obs_entropy", saved.d_obs_entropy, {a.on[AMBIGUITY] ? C : 0});
  like_forward("d_prompt_colors", saved.d_prompt_colors, {a.on[PROMPT] ? B : 0, C});
  check("grad", saved.grad, saved.grad.sizes());
  TORCH_CHECK_VALUE(saved.grad.numel() == 1, "grad must have one element, got ", saved.grad.sizes());
  if (a.hard_mode != HARD_CELL) return;
  TORCH_CHECK_VALUE(saved.predicted, "predicted must be there where hard_mode is 1, got None");
  check_dense("predicted", *saved.predicted);
  TORCH_CHECK_VALUE(
      saved.predicted->sizes() == a.target.sizes() && saved.predicted->scalar_type() == at::kByte,
      "predicted must be uint8 ", a.target.sizes(), ", got ", saved.predicted->dtype(), " ", saved.predicted->sizes());
}

// unit [C] or [B, C], times factor; a loop, as the three ops of torch that it takes are slow by comparison
template <class T>
at::Tensor scaled_like(const at::Tensor& unit, double factor, const at::Tensor& like) {
  const at::Tensor out = at::empty_like(like);
  const int64_t C = like.size(-1), stride_b = like.dim() > 1 ? out.stride(0) : 0, stride_c = out.stride(-1);
  const T* const from = unit.const_data_ptr<T>();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, like.scalar_type(), "efe_loss_backward", [&] {
    scalar_t* const to = out.data_ptr<scalar_t>();
    for (int64_t k = 0; k < out.numel(); ++k) {
      to[k / C * stride_b + k % C * stride_c] = static_cast<scalar_t>(from[k] * factor);
    }
  });
  return out;
}

// empty_like, which takes twice as long
at::Tensor new_like(const at::Tensor& x) {
  return x.is_contiguous() ? at::empty(x.sizes(), x.options()) : at::empty_like(x);
}

template <class T>
double number_in(const at::Tensor& x) {
  return x.scalar_type() == c10::CppTypeToScalarType<T>::value ? *x.const_data_ptr<T>() : x.item<double>();
}

template <class T>
Five backward_as(const Arguments& a, const Saved& saved, const Needs& needs) {
  const Smalls<T> small(a);
  Job<T> job = make_job<T>(a, small);
  const at::Tensor nothing;
  const bool preference = job.on[RISK] || job.on[ANCHOR];
  const at::Tensor d_plan = needs[0] ? new_like(a.plan) : nothing;
  const at::Tensor d_back = needs[1] && job.on[AGREEMENT] ? at::empty_like(*a.back) : nothing;
  const at::Tensor d_preference = needs[2] && preference ? at::empty_like(*a.preference) : nothing;
  if (needs[0] && d_plan.numel() > 0) job.d_plan = strided_plan(d_plan);
  if (d_back.defined() && d_back.numel() > 0) job.d_back = strided_plan(d_back);
  if (d_preference.defined() && d_preference.numel() > 0) job.d_preference = strided(d_preference, true, false, true);
  const at::Tensor coef = saved.coef.contiguous();
  job.coef = coef.const_data_ptr<T>();
  job.upstream = number_in<T>(saved.grad) * job.coef[2 * job.B];
  std::vector<T> pooled;
  if (job.on[PROMPT]) {
    const at::Tensor d_pooled = saved.d_pooled.contiguous();
    pooled.assign(d_pooled.const_data_ptr<T>(), d_pooled.const_data_ptr<T>() + d_pooled.numel());
    for (T& x : pooled) x *= static_cast<T>(job.upstream);
  }
  job.d_pooled = pooled.data();
  at::Tensor predicted;
  if (job.hard_mode == HARD_CELL) {
    predicted = saved.predicted->contiguous();
    job.predicted = predicted.data_ptr<uint8_t>();
  }
  const auto tile = tile_functions<T>().backward;
  each_tile(job, [&](int64_t unit, T* scratch) { tile(job, unit, scratch); });
  const auto scaled = [&](bool wanted, const at::Tensor& unit, const OptionalTensor& like) {
    return wanted ? scaled_like<T>(unit.contiguous(), job.upstream, *like) : nothing;
  };
  return {
      d_plan, d_back, d_preference, scaled(needs[3] && job.on[AMBIGUITY], saved.d_obs_entropy, a.obs_entropy),
      scaled(needs[4] && job.on[PROMPT], saved.d_prompt_colors, a.prompt_colors)};
}

}  // namespace

ForwardResult efe_forward(const Arguments& a) {
  check(a);
  return any_double(a) ? forward_as<double>(a) : forward_as<float>(a);
}

Five efe_backward(const Arguments& a, const Saved& saved, const Needs& needs) {
  return any_double(a) ? backward_as<double>(a, saved, needs) : backward_as<float>(a, saved, needs);
}

namespace {

Eight efe_loss(
    const at::Tensor& plan, const at::Tensor& target, const OptionalTensor& back, const OptionalTensor& preference,
    const OptionalTensor& anchor, const OptionalTensor& obs_entropy, const OptionalTensor& prompt_colors,
    const OptionalTensor& step_weight, const OptionalTensor& class_weight, const OptionalTensor& annealed, const On& on,
    at::ArrayRef<double> weights, double hard_floor, int64_t hard_mode, int64_t ignore_index) {
  const Arguments a{plan,         target,   back, preference, anchor,     obs_entropy, prompt_colors, step_weight,
                    class_weight, annealed, on,   weights,    hard_floor, hard_mode,   ignore_index};
  const ForwardResult r = efe_forward(a);
  const Axes axes(a.plan);
  const auto or_empty = [&](const at::Tensor& x, at::IntArrayRef shape) {
    return x.defined() ? x : at::empty(shape, r.loss.options());
  };
  return {
      r.loss,
      r.terms,
      r.solved,
      r.predicted,
      r.coef,
      or_empty(r.d_pooled, {0, axes.T, axes.C}),
      or_empty(r.d_obs_entropy, {0}),
      or_empty(r.d_prompt_colors, {0, axes.C})};
}

Five efe_loss_backward(
    const at::Tensor& grad, const at::Tensor& plan, const at::Tensor& target, const OptionalTensor& back,
    const OptionalTensor& preference, const OptionalTensor& anchor, const OptionalTensor& obs_entropy,
    const OptionalTensor& prompt_colors, const OptionalTensor& step_weight, const OptionalTensor& class_weight,
    const OptionalTensor& annealed, const OptionalTensor& predicted, const at::Tensor& coef, const at::Tensor& d_pooled,
    const at::Tensor& d_obs_entropy, const at::Tensor& d_prompt_colors, const On& on, at::ArrayRef<double> weights,
    double hard_floor, int64_t hard_mode, int64_t ignore_index, const Needs& needs) {
  const Arguments a{plan,         target,   back, preference, anchor,     obs_entropy, prompt_colors, step_weight,
                    class_weight, annealed, on,   weights,    hard_floor, hard_mode,   ignore_index};
  check(a);
  const Saved saved{grad, predicted, coef, d_pooled, d_obs_entropy, d_prompt_colors};
  any_double(a) ? check_saved_as<double>(a, saved) : check_saved_as<float>(a, saved);
  Five found = efe_backward(a, saved, needs);
  const at::Tensor nothing = at::empty({0}, plan.options());
  std::apply([&](auto&... x) { ((x = x.defined() ? x : nothing), ...); }, found);
  return found;
}

}  // namespace

TORCH_LIBRARY_IMPL(qwen_fused, CPU, m) {
  m.impl("efe_loss", &efe_loss);
  m.impl("efe_loss_backward", &efe_loss_backward);
}

}  // namespace qwen_fused

// The expected-free-energy loss on the CPU: one threaded pass over the logits forward and one backward. Formulas, edge
// rules and names are those of kernels/reference.py.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <cmath>
#include <limits>
#include <vector>

#include "efe_job.h"
#include "vectorize.h"

namespace qwen_fused {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

// ---- one pair of functions per instruction set, chosen at run time ----

template <class T>
using Forward = void (*)(const Job<T>&, int64_t, T*, double*);
template <class T>
using Backward = void (*)(const Job<T>&, int64_t);

namespace baseline {
#include "efe_math.h"
#include "efe_tiles.h"
template <class T>
using Lanes = Simd<T, 16>;
}  // namespace baseline

#if defined(__x86_64__) && !defined(__clang__) && __GNUC__ >= 12
#define QF_LEVELS 1
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
namespace avx2 {
#include "efe_math.h"
#include "efe_tiles.h"
template <class T>
using Lanes = Simd<T, 32>;
}  // namespace avx2
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
namespace avx512 {
#include "efe_math.h"
#include "efe_tiles.h"
template <class T>
using Lanes = Simd<T, 64>;
}  // namespace avx512
#pragma GCC pop_options
#endif

template <class T>
std::pair<Forward<T>, Backward<T>> tile_functions() {
#ifdef QF_LEVELS
  if (__builtin_cpu_supports("x86-64-v4")) {
    return {&avx512::forward_tile<avx512::Lanes<T>>, &avx512::backward_tile<avx512::Lanes<T>>};
  }
  if (__builtin_cpu_supports("x86-64-v3")) {
    return {&avx2::forward_tile<avx2::Lanes<T>>, &avx2::backward_tile<avx2::Lanes<T>>};
  }
#endif
  return {&baseline::forward_tile<baseline::Lanes<T>>, &baseline::backward_tile<baseline::Lanes<T>>};
}

// ---- what both directions ask of their arguments ----

struct Arguments {
  const at::Tensor &plan, &target;
  const OptionalTensor &back, &preference, &anchor, &obs_entropy, &prompt_colors, &step_weight, &class_weight;
  at::ArrayRef<double> weights;
  double hard_floor;
  int64_t hard_mode, ignore_index;
};

void check(const char* name, const OptionalTensor& x, at::IntArrayRef shape) {
  if (!x) return;
  TORCH_CHECK_VALUE(x->sizes() == shape, name, " must be ", shape, ", got ", x->sizes());
  TORCH_CHECK_VALUE(x->is_cpu(), name, " must be on the CPU, got ", x->device());
  const auto type = x->scalar_type();
  TORCH_CHECK_VALUE(
      type == at::kFloat || type == at::kDouble || type == at::kHalf || type == at::kBFloat16, name,
      " must be float16, bfloat16, float32 or float64, got ", type);
}

void check(const Arguments& a) {
  TORCH_CHECK_VALUE(a.plan.dim() == 5, "plan must be [B, T, C, H, W], got ", a.plan.sizes());
  const int64_t B = a.plan.size(0), T = a.plan.size(1), C = a.plan.size(2), H = a.plan.size(3), W = a.plan.size(4);
  TORCH_CHECK_VALUE(T >= 1, "plan must have at least one step, got ", a.plan.sizes());
  TORCH_CHECK_VALUE(C >= 1 && C <= MAX_CLASSES, "plan must have 1 to ", MAX_CLASSES, " classes, got ", C);
  TORCH_CHECK_VALUE(a.target.sizes() == at::IntArrayRef({B, H, W}), "target must be [B, H, W], got ", a.target.sizes());
  TORCH_CHECK_VALUE(
      at::isIntegralType(a.target.scalar_type(), false) && a.target.element_size() <= 8 && a.target.is_cpu(),
      "target must be an integer tensor on the CPU, got ", a.target.scalar_type(), " on ", a.target.device());
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
}

bool any_double(const Arguments& a) {
  const auto is_double = [](const OptionalTensor& x) { return x && x->scalar_type() == at::kDouble; };
  return is_double(a.plan) || is_double(a.back) || is_double(a.preference) || is_double(a.obs_entropy) ||
         is_double(a.prompt_colors);
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
  job.B = a.plan.size(0), job.steps = a.plan.size(1), job.classes = a.plan.size(2);
  job.cells = a.plan.size(3) * a.plan.size(4);
  job.tiles = (job.cells + TILE - 1) / TILE;
  job.target = a.target;
  const bool there[TERMS] = {
      true,
      a.preference.has_value(),
      a.obs_entropy.has_value(),
      a.back.has_value(),
      a.preference.has_value() && a.anchor.has_value(),
      a.prompt_colors.has_value()};
  for (int k = 0; k < TERMS; ++k) job.weight[k] = a.weights[k], job.on[k] = there[k] && (k == CE || a.weights[k] != 0);
  job.plan = Cells<T>(a.plan, true, true);
  if (job.on[AGREEMENT]) job.back = Cells<T>(*a.back, true, true);
  if (job.on[RISK] || job.on[ANCHOR]) job.preference = Cells<T>(*a.preference, true, false);
  if (job.on[ANCHOR]) job.anchor = Cells<T>(*a.anchor, false, false);
  job.obs_entropy = small.obs_entropy.data();
  job.step_weight = small.step_weight.data(), job.class_weight = small.class_weight.data();
  job.hard_floor = a.hard_floor, job.hard_mode = static_cast<int>(a.hard_mode), job.ignore_index = a.ignore_index;
  return job;
}

// tiles a thread should have at least, so that starting it pays
template <class T>
int64_t grain(const Job<T>& job) {
  return std::max<int64_t>(1, (1 << 15) / (TILE * job.classes * job.steps));
}

[[noreturn]] void refuse_target(const Arguments& a, int64_t bad) {
  const at::Tensor target = a.target.to(at::kLong).contiguous();
  const int64_t* const o = target.const_data_ptr<int64_t>();
  int64_t found = 0;
  for (int64_t i = target.numel() - 1; i >= 0; --i) {
    if (o[i] != a.ignore_index && (o[i] < 0 || o[i] >= a.plan.size(2))) found = o[i];
  }
  C10_THROW_ERROR(
      ValueError, c10::str(
                      "target must be in [0, ", a.plan.size(2), ") or ignore_index ", a.ignore_index, ", got ", found,
                      " (", bad, " cells outside)"));
}

struct ForwardResult {
  at::Tensor loss, terms, solved, predicted, coef, d_pooled, d_obs_entropy, d_prompt_colors;
};

// cos(u, v) with each norm held at eps or above, and its gradients times `scale` added to du, dv
double cosine(const double* u, const double* v, int64_t C, double scale, double* du, double* dv) {
  constexpr double eps = 1e-8;
  double uu = 0, vv = 0, uv = 0;
  for (int64_t c = 0; c < C; ++c) uu += u[c] * u[c], vv += v[c] * v[c], uv += u[c] * v[c];
  const double nu = std::max(std::sqrt(uu), eps), nv = std::max(std::sqrt(vv), eps), cos = uv / (nu * nv);
  const double tilt_u = std::sqrt(uu) < eps ? 0 : cos / (nu * nu), tilt_v = std::sqrt(vv) < eps ? 0 : cos / (nv * nv);
  for (int64_t c = 0; c < C; ++c) {
    du[c] = scale * (v[c] / (nu * nv) - tilt_u * u[c]);
    dv[c] += scale * (u[c] / (nu * nv) - tilt_v * v[c]);
  }
  return cos;
}

template <class T>
ForwardResult forward_as(const Arguments& a) {
  const Smalls<T> small(a);
  Job<T> job = make_job<T>(a, small);
  const int64_t B = job.B, C = job.classes, steps = job.steps, size = job.slot_size();
  const auto options = a.plan.options().dtype(c10::CppTypeToScalarType<T>::value);
  ForwardResult out;
  out.predicted = at::empty(a.target.sizes(), options.dtype(at::kByte));
  job.predicted = out.predicted.template data_ptr<uint8_t>();

  std::vector<double> slots(B * job.tiles * size);
  const Forward<T> tile = tile_functions<T>().first;
  at::parallel_for(0, B * job.tiles, grain(job), [&](int64_t begin, int64_t end) {
    std::vector<T> pooled(job.on[PROMPT] ? steps * C * MAX_LANES : 0);
    for (int64_t unit = begin; unit < end; ++unit) tile(job, unit, pooled.data(), slots.data() + unit * size);
  });

  // one slot per episode, in order
  std::vector<double> episodes(B * size);
  double bad = 0, with_cells = 0;
  for (int64_t b = 0; b < B; ++b) {
    double* const sum = episodes.data() + b * size;
    for (int64_t tile = 0; tile < job.tiles; ++tile) {
      const double* const slot = slots.data() + (b * job.tiles + tile) * size;
      for (int64_t k = 0; k < size; ++k) sum[k] += slot[k];
    }
    bad += sum[S_BAD], with_cells += sum[S_CELLS] > 0;
  }
  if (bad > 0) refuse_target(a, static_cast<int64_t>(bad));

  out.loss = at::empty({}, options);
  out.terms = at::empty({B, TERMS + 2}, options);
  out.solved = at::empty({B}, options.dtype(at::kBool));
  out.coef = at::empty({B + 1, 2}, options);
  out.d_pooled = at::empty({job.on[PROMPT] ? B : 0, steps, C}, options);
  out.d_obs_entropy = at::empty({job.on[AMBIGUITY] ? C : 0}, options);
  out.d_prompt_colors = at::empty({job.on[PROMPT] ? B : 0, C}, options);
  T* const terms = out.terms.template data_ptr<T>();
  T* const coef = out.coef.template data_ptr<T>();
  std::vector<double> d_obs(C), du(C), dv(C), u(C), v(C);
  double loss = 0;
  for (int64_t b = 0; b < B; ++b) {
    const double* const sum = episodes.data() + b * size;
    const double* const mass = sum + S_HEAD;
    const double* const pooled = mass + (job.on[AMBIGUITY] ? C : 0);
    const double n = std::max(sum[S_CELLS], 1.0), ratio = sum[S_HARD] / n;
    const double sigma = job.hard_mode == HARD_EPISODE ? job.hard_floor + (1 - job.hard_floor) * ratio : 1.0;
    // weight of this episode's terms, but for 1 / number of episodes
    const double share = sum[S_CELLS] > 0 ? sigma : 0.0;
    double term[TERMS] = {};
    term[CE] = sum[S_KAPPA] != 0 ? sum[S_CE] / sum[S_KAPPA] : 0.0;
    term[RISK] = sum[S_RISK] / n, term[AGREEMENT] = sum[S_AGREEMENT] / n, term[ANCHOR] = sum[S_ANCHOR] / n;
    if (job.on[AMBIGUITY]) {
      for (int64_t c = 0; c < C; ++c) {
        term[AMBIGUITY] += mass[c] / n * job.obs_entropy[c];
        d_obs[c] += share * job.weight[AMBIGUITY] * mass[c] / n;
      }
    }
    if (job.on[PROMPT]) {
      const bool counts = sum[S_CELLS] > 0;
      for (int64_t c = 0; c < C; ++c) v[c] = counts ? small.prompt_colors.data()[b * C + c] : 0.0, dv[c] = 0;
      for (int64_t t = 0; t < steps; ++t) {
        for (int64_t c = 0; c < C; ++c) u[c] = pooled[t * C + c] / n;
        const double scale = -share * job.weight[PROMPT] / static_cast<double>(steps);
        term[PROMPT] -= cosine(u.data(), v.data(), C, scale, du.data(), dv.data()) / static_cast<double>(steps);
        T* const d_pooled = out.d_pooled.template data_ptr<T>() + (b * steps + t) * C;
        for (int64_t c = 0; c < C; ++c) d_pooled[c] = static_cast<T>(counts ? du[c] / n : 0.0);
      }
      T* const d_prompt = out.d_prompt_colors.template data_ptr<T>() + b * C;
      for (int64_t c = 0; c < C; ++c) d_prompt[c] = static_cast<T>(counts ? dv[c] : 0.0);
    }
    double total = 0;
    for (int k = 0; k < TERMS; ++k) {
      terms[b * (TERMS + 2) + k] = static_cast<T>(term[k]);
      if (job.on[k] && job.weight[k] != 0) total += job.weight[k] * term[k];
    }
    terms[b * (TERMS + 2) + TERMS] = static_cast<T>(ratio);
    terms[b * (TERMS + 2) + TERMS + 1] = static_cast<T>((sum[S_CELLS] - sum[S_HARD]) / n);
    out.solved.template data_ptr<bool>()[b] = sum[S_CELLS] > 0 && sum[S_HARD] == 0;
    coef[2 * b] = static_cast<T>(share / n);
    coef[2 * b + 1] = static_cast<T>(sum[S_KAPPA] != 0 ? share / sum[S_KAPPA] : 0.0);
    if (sum[S_CELLS] > 0) loss += share * total;
  }
  for (int64_t c = 0; job.on[AMBIGUITY] && c < C; ++c) {
    out.d_obs_entropy.template data_ptr<T>()[c] = static_cast<T>(d_obs[c]);
  }
  const double episode = 1 / std::max(with_cells, 1.0);
  coef[2 * B] = static_cast<T>(episode), coef[2 * B + 1] = 0;
  *out.loss.template data_ptr<T>() = static_cast<T>(loss * episode);
  return out;
}

using Eight =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using Five = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Eight efe_loss(
    const at::Tensor& plan, const at::Tensor& target, const OptionalTensor& back, const OptionalTensor& preference,
    const OptionalTensor& anchor, const OptionalTensor& obs_entropy, const OptionalTensor& prompt_colors,
    const OptionalTensor& step_weight, const OptionalTensor& class_weight, at::ArrayRef<double> weights,
    double hard_floor, int64_t hard_mode, int64_t ignore_index) {
  const Arguments a{plan,        target,       back,    preference, anchor,    obs_entropy, prompt_colors,
                    step_weight, class_weight, weights, hard_floor, hard_mode, ignore_index};
  check(a);
  ForwardResult r = any_double(a) ? forward_as<double>(a) : forward_as<float>(a);
  return {r.loss, r.terms, r.solved, r.predicted, r.coef, r.d_pooled, r.d_obs_entropy, r.d_prompt_colors};
}

struct Saved {
  const at::Tensor& grad;
  const OptionalTensor& predicted;
  const at::Tensor &coef, &d_pooled, &d_obs_entropy, &d_prompt_colors;
};

template <class T>
Five backward_as(const Arguments& a, const Saved& saved, at::ArrayRef<bool> needs) {
  const Smalls<T> small(a);
  Job<T> job = make_job<T>(a, small);
  const at::Tensor nothing = at::empty({0}, a.plan.options());
  const auto wanted = [&](bool wanted, const at::Tensor& like) { return wanted ? at::empty_like(like) : nothing; };
  const at::Tensor d_plan = wanted(needs[0], a.plan);
  const at::Tensor d_back = needs[1] && job.on[AGREEMENT] ? at::empty_like(*a.back) : nothing;
  const bool preference = job.on[RISK] || job.on[ANCHOR];
  const at::Tensor d_preference = needs[2] && preference ? at::empty_like(*a.preference) : nothing;
  if (d_plan.numel() > 0) job.d_plan = Cells<T>(d_plan, true, true);
  if (d_back.numel() > 0) job.d_back = Cells<T>(d_back, true, true);
  if (d_preference.numel() > 0) job.d_preference = Cells<T>(d_preference, true, false);
  const at::Tensor grad = saved.grad.to(at::kDouble), coef = saved.coef.contiguous(),
                   pooled = saved.d_pooled.contiguous();
  job.coef = coef.const_data_ptr<T>();
  job.upstream = *grad.const_data_ptr<double>() * job.coef[2 * job.B];
  job.d_pooled = job.on[PROMPT] ? pooled.const_data_ptr<T>() : nullptr;
  at::Tensor predicted;
  if (job.hard_mode == HARD_CELL) {
    TORCH_CHECK_VALUE(saved.predicted, "predicted must be there where hard_mode is 1, got None");
    predicted = saved.predicted->contiguous();
    job.predicted = const_cast<uint8_t*>(predicted.const_data_ptr<uint8_t>());
  }
  const Backward<T> tile = tile_functions<T>().second;
  at::parallel_for(0, job.B * job.tiles, grain(job), [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) tile(job, unit);
  });
  const auto scaled = [&](bool wanted, const at::Tensor& unit, const OptionalTensor& like) {
    return wanted ? unit.to(at::kDouble).mul(job.upstream).to(like->scalar_type()) : nothing;
  };
  return {
      d_plan, d_back, d_preference, scaled(needs[3] && job.on[AMBIGUITY], saved.d_obs_entropy, a.obs_entropy),
      scaled(needs[4] && job.on[PROMPT], saved.d_prompt_colors, a.prompt_colors)};
}

Five efe_loss_backward(
    const at::Tensor& grad, const at::Tensor& plan, const at::Tensor& target, const OptionalTensor& back,
    const OptionalTensor& preference, const OptionalTensor& anchor, const OptionalTensor& obs_entropy,
    const OptionalTensor& prompt_colors, const OptionalTensor& step_weight, const OptionalTensor& class_weight,
    const OptionalTensor& predicted, const at::Tensor& coef, const at::Tensor& d_pooled,
    const at::Tensor& d_obs_entropy, const at::Tensor& d_prompt_colors, at::ArrayRef<double> weights, double hard_floor,
    int64_t hard_mode, int64_t ignore_index, const std::array<bool, 5>& needs) {
  const Arguments a{plan,        target,       back,    preference, anchor,    obs_entropy, prompt_colors,
                    step_weight, class_weight, weights, hard_floor, hard_mode, ignore_index};
  check(a);
  TORCH_CHECK_VALUE(grad.numel() == 1, "grad must have one element, got ", grad.sizes());
  const Saved saved{grad, predicted, coef, d_pooled, d_obs_entropy, d_prompt_colors};
  return any_double(a) ? backward_as<double>(a, saved, needs) : backward_as<float>(a, saved, needs);
}

}  // namespace

TORCH_LIBRARY_IMPL(qwen_fused, CPU, m) {
  m.impl("efe_loss", &efe_loss);
  m.impl("efe_loss_backward", &efe_loss_backward);
}

}  // namespace qwen_fused

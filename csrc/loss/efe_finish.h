// From the sums of each episode to the terms, the loss, and the small gradients that need no second pass.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "efe_cpu.h"
#include "efe_job.h"

namespace qwen_fused {

inline double largest_of(const double* u, int64_t C) {
  double found = 0;
  for (int64_t c = 0; c < C; ++c) found = std::max(found, std::abs(u[c]));
  return found > 0 ? found : 1.0;
}

// cos(u, v) with each norm held at eps or above, and its gradients times `scale` added to du, dv; u and v go by their
// largest elements, so that no square overflows
inline double cosine(const double* u, const double* v, int64_t C, double scale, double* du, double* dv) {
  constexpr double eps = 1e-8;
  const double su = largest_of(u, C), sv = largest_of(v, C);
  double uu = 0, vv = 0, uv = 0;
  for (int64_t c = 0; c < C; ++c) {
    const double x = u[c] / su, y = v[c] / sv;
    uu += x * x, vv += y * y, uv += x * y;
  }
  const double nu = std::max(std::sqrt(uu), eps / su), nv = std::max(std::sqrt(vv), eps / sv), cos = uv / (nu * nv);
  const double tilt_u = std::sqrt(uu) < nu ? 0 : cos / (nu * nu), tilt_v = std::sqrt(vv) < nv ? 0 : cos / (nv * nv);
  for (int64_t c = 0; c < C; ++c) {
    const double x = u[c] / su, y = v[c] / sv;
    du[c] = scale * ((y / (nu * nv) - tilt_u * x) / su);
    dv[c] += scale * ((x / (nu * nv) - tilt_v * y) / sv);
  }
  return cos;
}

// a divergence that is negative by rounding alone, as a sum of what cancels may be, is 0
inline double not_negative(double divergence, double rounding = std::numeric_limits<double>::infinity()) {
  return divergence < 0 && divergence > -rounding ? 0.0 : divergence;
}

// sums: of each episode, laid out as a slot; prompt_colors [B, C]
template <class T>
void finish(const Job<T>& job, const std::vector<double>& sums, const T* prompt_colors, ForwardResult& out) {
  const int64_t B = job.B, C = job.classes, steps = job.steps;
  const auto options = at::TensorOptions(c10::CppTypeToScalarType<T>::value);
  out.loss = at::empty({}, options);
  out.terms = at::empty({B, TERMS + 2}, options);
  out.solved = at::empty({B}, options.dtype(at::kBool));
  out.coef = at::empty({B + 1, 2}, options);
  if (job.on[AMBIGUITY]) out.d_obs_entropy = at::empty({C}, options);
  if (job.on[PROMPT])
    out.d_pooled = at::empty({B, steps, C}, options), out.d_prompt_colors = at::empty({B, C}, options);
  T* const terms = out.terms.template data_ptr<T>();
  T* const coef = out.coef.template data_ptr<T>();
  std::vector<double> d_obs(C), du(C), dv(C), u(C), v(C);
  double loss = 0, with_cells = 0;
  for (int64_t b = 0; b < B; ++b) {
    const double* const sum = sums.data() + b * job.slot_size();
    const double* const mass = sum + S_HEAD;
    const double* const pooled = mass + (job.on[AMBIGUITY] ? C : 0);
    const double n = std::max(sum[S_CELLS], 1.0), ratio = sum[S_HARD] / n;
    const double sigma = job.hard_mode == HARD_EPISODE ? job.hard_floor + (1 - job.hard_floor) * ratio : 1.0;
    // weight of this episode's terms, but for 1 / number of episodes
    const double share = sum[S_CELLS] > 0 ? sigma : 0.0;
    double term[TERMS] = {};
    term[CE] = sum[S_KAPPA] != 0 ? sum[S_CE] / sum[S_KAPPA] : 0.0;
    term[RISK] = not_negative(sum[S_RISK] / n), term[AGREEMENT] = not_negative(sum[S_AGREEMENT] / n);
    // the anchor is what somebody gives, and need not add up to 1
    term[ANCHOR] = not_negative(sum[S_ANCHOR] / n, 16 * std::numeric_limits<T>::epsilon());
    if (job.on[AMBIGUITY]) {
      for (int64_t c = 0; c < C; ++c) {
        term[AMBIGUITY] += mass[c] / n * job.obs_entropy[c];
        d_obs[c] += share * job.weight[AMBIGUITY] * mass[c] / n;
      }
    }
    if (job.on[PROMPT]) {
      const bool counts = sum[S_CELLS] > 0;
      for (int64_t c = 0; c < C; ++c) v[c] = counts ? prompt_colors[b * C + c] : 0.0, dv[c] = 0;
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
      if (job.on[k]) total += job.weight[k] * term[k];
    }
    terms[b * (TERMS + 2) + TERMS] = static_cast<T>(ratio);
    terms[b * (TERMS + 2) + TERMS + 1] = static_cast<T>((sum[S_CELLS] - sum[S_HARD]) / n);
    out.solved.template data_ptr<bool>()[b] = sum[S_CELLS] > 0 && sum[S_HARD] == 0;
    coef[2 * b] = static_cast<T>(share / n);
    coef[2 * b + 1] = static_cast<T>(sum[S_KAPPA] != 0 ? share / sum[S_KAPPA] : 0.0);
    if (sum[S_CELLS] > 0) loss += share * total, ++with_cells;
  }
  for (int64_t c = 0; job.on[AMBIGUITY] && c < C; ++c) {
    out.d_obs_entropy.template data_ptr<T>()[c] = static_cast<T>(d_obs[c]);
  }
  const double episode = 1 / std::max(with_cells, 1.0);
  coef[2 * B] = static_cast<T>(episode), coef[2 * B + 1] = 0;
  *out.loss.template data_ptr<T>() = static_cast<T>(loss * episode);
}

}  // namespace qwen_fused

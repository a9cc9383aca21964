// The planner's recurrence on the CPU: T steps forward, and backward through all of them, each in one call. Between the
// matrix products, which are torch's, everything of a step is one of the loops of plan_loops.h; the spec is
// qwen_fused/planner/plan_core.py. One thread: tasks are solved side by side, a process a core.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "plan_context.h"
#include "plan_loops.h"

namespace qwen_fused {
namespace {

using In = const at::Tensor&;

// one copy of each loop per type and instruction set
#define QF_BOTH(T)                                                                                                     \
  QF_MULTIVERSION void rms(const PlanShape& p, const T* s, const T* norm, const T* alive, T* x) {                      \
    rms_rows(p, s, norm, alive, x);                                                                                    \
  }                                                                                                                    \
  QF_MULTIVERSION void rms_back(                                                                                       \
      const PlanShape& p, const T* s, const T* norm, const T* alive, const T* dx, T* ds, T* d_norm) {                  \
    rms_rows_backward(p, s, norm, alive, dx, ds, d_norm);                                                              \
  }                                                                                                                    \
  QF_MULTIVERSION void local(const PlanShape& p, const T* x, const T* z, T* a) { local_rows(p, x, z, a); }             \
  QF_MULTIVERSION void local_back(const PlanShape& p, const T* da, T* dz) { local_rows_backward(p, da, dz); }          \
  QF_MULTIVERSION void context(const PlanShape& p, const T* z, const T* counts, T* a, T* room) {                       \
    context_rows(p, z, counts, a, room);                                                                               \
  }                                                                                                                    \
  QF_MULTIVERSION void context_back(                                                                                   \
      const PlanShape& p, const T* z, const T* a, const T* counts, const T* da, T* dz, T* room) {                      \
    context_rows_backward(p, z, a, counts, da, dz, room);                                                              \
  }                                                                                                                    \
  QF_MULTIVERSION void relu(const PlanShape& p, const T* bias, const T* alive, T* z) { relu_rows(p, bias, alive, z); } \
  QF_MULTIVERSION void film(const PlanShape& p, T* pre, const T* bias, const T* scale, const T* shift, T* u) {         \
    film_rows(p, pre, bias, scale, shift, u);                                                                          \
  }                                                                                                                    \
  QF_MULTIVERSION void film_back(                                                                                      \
      const PlanShape& p, const T* pre, const T* scale, T* du, T* d_scale, T* d_shift, T* d_bias) {                    \
    film_rows_backward(p, pre, scale, du, d_scale, d_shift, d_bias);                                                   \
  }                                                                                                                    \
  QF_MULTIVERSION void mask(const PlanShape& p, const T* alive, T* rows, int64_t width) {                              \
    mask_rows(p, alive, rows, width);                                                                                  \
  }
QF_BOTH(float)
QF_BOTH(double)
#undef QF_BOTH

void check(In tensor, const char* name, In like, at::IntArrayRef expected) {
  TORCH_CHECK(tensor.sizes() == expected, name, " must be ", expected, ", got ", tensor.sizes());
  TORCH_CHECK(
      tensor.scalar_type() == like.scalar_type() && tensor.device() == like.device(), name, " must be ",
      like.scalar_type(), " on ", like.device(), " like state, got ", tensor.scalar_type(), " on ", tensor.device());
}

PlanShape shape_of(In state, In alive, In scale, In shift, In norm, In wz, In wc, In wu, int64_t part) {
  TORCH_CHECK(state.dim() == 5, "state must be [N, P, H, W, F], got ", state.sizes());
  TORCH_CHECK(wz.dim() == 2 && wc.dim() == 2, "wz and wc must be matrices, got ", wz.sizes(), " and ", wc.sizes());
  PlanShape p{};
  p.N = state.size(0), p.P = state.size(1), p.H = state.size(2), p.W = state.size(3), p.F = state.size(4);
  const int64_t parts = p.P == 1 ? 6 : 7, seen = p.P == 1 ? 7 : 9;
  p.Z = wz.size(1), p.hidden = wc.size(1), p.c = part, p.m = p.Z - parts * part;
  TORCH_CHECK(part >= 1 && p.m >= 1, "wz must be [F, more than ", parts, " * part], got ", wz.sizes());
  p.Q = p.context() + seen * p.c;
  check(wz, "wz", state, {p.F, p.Z});
  check(wc, "wc", state, {p.Q, p.hidden});
  check(wu, "wu", state, {p.hidden, p.F});
  TORCH_CHECK(
      alive.sizes() == at::IntArrayRef({p.N, p.H, p.W}) && alive.scalar_type() == at::kBool,
      "alive must be bool [N, H, W], got ", alive.scalar_type(), " ", alive.sizes());
  check(scale, "scale", state, {p.N, p.hidden});
  check(shift, "shift", state, {p.N, p.hidden});
  check(norm, "norm", state, {p.F});
  return p;
}

// living cells of each row and column of an episode: [N, H + W], at least 1
at::Tensor counts_of(In alive) { return at::cat({alive.sum(2), alive.sum(1)}, 1).clamp_min(1).contiguous(); }

// z [T, R, Z], a [T, R, Q] and pre [T, R, hidden] of all steps, one behind the other in a tensor of integers as
// wide as an element: what backward needs is no result, and nothing can take it for one
struct Workspace {
  at::Tensor z, a, pre;

  static int64_t size(const PlanShape& p, int64_t steps) { return steps * p.rows() * (p.Z + p.Q + p.hidden); }

  Workspace(In words, const PlanShape& p, int64_t steps, at::ScalarType type) {
    const at::Tensor all = words.view(type);
    int64_t begin = 0;
    const auto next = [&](int64_t width) {
      const int64_t count = steps * p.rows() * width;
      begin += count;
      return all.narrow(0, begin - count, count).view({steps, p.rows(), width});
    };
    z = next(p.Z), a = next(p.Q), pre = next(p.hidden);
  }
};

// states [T, N, P, H, W, F] after each step, and the workspace
std::tuple<at::Tensor, at::Tensor> plan_core(
    In state_in, In alive_in, In scale_in, In shift_in, In norm_in, In wz, In bz_in, In wc, In bias_in, In wu,
    int64_t part, int64_t steps) {
  const PlanShape p = shape_of(state_in, alive_in, scale_in, shift_in, norm_in, wz, wc, wu, part);
  check(bz_in, "bz", state_in, {p.Z});
  check(bias_in, "bias", state_in, {p.hidden});
  TORCH_CHECK(steps >= 1, "steps must be at least 1, got ", steps);
  const auto state = state_in.contiguous(), alive = alive_in.to(state_in.scalar_type()).contiguous(),
             scale = scale_in.contiguous(), shift = shift_in.contiguous(), norm = norm_in.contiguous(),
             bz = bz_in.contiguous(), bias = bias_in.contiguous();
  const int64_t R = p.rows();
  const auto options = state.options();
  at::Tensor states = at::empty({steps, p.N, p.P, p.H, p.W, p.F}, options);
  const at::Tensor words =
      at::empty({Workspace::size(p, steps)}, options.dtype(state.element_size() == 8 ? at::kLong : at::kInt));
  const Workspace work(words, p, steps, state.scalar_type());
  at::Tensor x = at::empty({R, p.F}, options), u = at::empty({R, p.hidden}, options);
  at::Tensor room = at::empty({3 * (p.H + p.W + 2) * p.c}, options);
  const at::Tensor counts = counts_of(alive);
  AT_DISPATCH_FLOATING_TYPES(state.scalar_type(), "plan_core", [&] {
    const auto at_ = [](In t) { return t.data_ptr<scalar_t>(); };
    for (int64_t t = 0; t < steps; ++t) {
      const at::Tensor before = t == 0 ? state : states[t - 1];
      at::Tensor z_t = work.z[t], a_t = work.a[t], pre_t = work.pre[t];
      rms(p, at_(before), at_(norm), at_(alive), at_(x));
      at::mm_out(z_t, x, wz);
      relu(p, at_(bz), at_(alive), at_(z_t));
      local(p, at_(x), at_(z_t), at_(a_t));
      context(p, at_(z_t), at_(counts), at_(a_t), at_(room));
      at::mm_out(pre_t, a_t, wc);
      film(p, at_(pre_t), at_(bias), at_(scale), at_(shift), at_(u));
      at::Tensor h = at::gelu(u);
      mask(p, at_(alive), at_(h), p.hidden);
      at::Tensor after = states[t].view({R, p.F});
      at::addmm_out(after, before.reshape({R, p.F}), h, wu);
    }
  });
  return {states, words};
}

// gradients of state, scale, shift, norm, wz, bz, wc, bias and wu
std::vector<at::Tensor> plan_core_backward(
    In grad_in, In state_in, In alive_in, In scale_in, In shift_in, In norm_in, In wz, In wc, In wu, In states,
    In words, int64_t part) {
  const PlanShape p = shape_of(state_in, alive_in, scale_in, shift_in, norm_in, wz, wc, wu, part);
  const auto state = state_in.contiguous(), alive = alive_in.to(state_in.scalar_type()).contiguous(),
             scale = scale_in.contiguous(), shift = shift_in.contiguous(), norm = norm_in.contiguous(),
             grad = grad_in.contiguous();
  const int64_t R = p.rows(), steps = states.size(0);
  const Workspace work(words, p, steps, state.scalar_type());
  const auto options = state.options();
  at::Tensor ds = grad[steps - 1].clone(), d_scale = at::zeros_like(scale), d_shift = at::zeros_like(shift);
  at::Tensor d_norm = at::zeros_like(norm), d_wz = at::zeros({p.F, p.Z}, options), d_bz = at::zeros({p.Z}, options);
  at::Tensor d_wc = at::zeros({p.Q, p.hidden}, options);
  at::Tensor d_bias = at::zeros({p.hidden}, options), d_wu = at::zeros({p.hidden, p.F}, options);
  at::Tensor x = at::empty({R, p.F}, options), dx = at::empty({R, p.F}, options), u = at::empty({R, p.hidden}, options);
  at::Tensor da = at::empty({R, p.Q}, options), dz = at::empty({R, p.Z}, options),
             dh = at::empty({R, p.hidden}, options);
  at::Tensor room = at::empty({3 * (p.H + p.W + 2) * p.c}, options);
  const at::Tensor counts = counts_of(alive), no_bias = at::zeros({p.hidden}, options);
  const at::Tensor wz_t = wz.t(), wc_t = wc.t(), wu_t = wu.t();
  AT_DISPATCH_FLOATING_TYPES(state.scalar_type(), "plan_core_backward", [&] {
    const auto at_ = [](In t) { return t.data_ptr<scalar_t>(); };
    for (int64_t t = steps - 1; t >= 0; --t) {
      const at::Tensor before = t == 0 ? state : states[t - 1];
      at::Tensor z_t = work.z[t], a_t = work.a[t], pre_t = work.pre[t], ds_rows = ds.view({R, p.F});
      // pre has its bias already
      film(p, at_(pre_t), at_(no_bias), at_(scale), at_(shift), at_(u));
      at::Tensor h = at::gelu(u);
      mask(p, at_(alive), at_(h), p.hidden);
      d_wu.addmm_(h.t(), ds_rows);
      at::mm_out(dh, ds_rows, wu_t);
      mask(p, at_(alive), at_(dh), p.hidden);
      at::Tensor du = at::gelu_backward(dh, u);
      film_back(p, at_(pre_t), at_(scale), at_(du), at_(d_scale), at_(d_shift), at_(d_bias));
      d_wc.addmm_(a_t.t(), du);
      at::mm_out(da, du, wc_t);
      local_back(p, at_(da), at_(dz));
      context_back(p, at_(z_t), at_(a_t), at_(counts), at_(da), at_(dz), at_(room));
      rms(p, at_(before), at_(norm), at_(alive), at_(x));
      d_wz.addmm_(x.t(), dz);
      d_bz.add_(dz.sum(0));
      // x is in a too, as it is
      dx.copy_(da.slice(1, 0, p.F));
      dx.addmm_(dz, wz_t);
      rms_back(p, at_(before), at_(norm), at_(alive), at_(dx), at_(ds), at_(d_norm));
      if (t > 0) ds.add_(grad[t - 1]);
    }
  });
  return {ds, d_scale, d_shift, d_norm, d_wz, d_bz, d_wc, d_bias, d_wu};
}

}  // namespace
}  // namespace qwen_fused

TORCH_LIBRARY_IMPL(qwen_fused, CPU, m) {
  m.impl("plan_core", qwen_fused::plan_core);
  m.impl("plan_core_backward", qwen_fused::plan_core_backward);
}

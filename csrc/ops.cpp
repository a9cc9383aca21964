// Schemas of every op in qwen_fused; each op's own file registers its implementation per device (TORCH_LIBRARY_IMPL).
// The Python module that they come in says what was built.
#include <c10/util/StringUtil.h>
#include <pybind11/pybind11.h>
#include <torch/library.h>
#include <torch/version.h>

#include <string>

#include "common/vectorize.h"
#include "loss/cross_entropy.h"
#include "norms/measured.h"

TORCH_LIBRARY(qwen_fused, m) {
  // rows: triples (begin, end, base): row r covers grads[begin:end] and counts its first bad tensor from base.
  // position: place of each gradient in the full parameter list; empty when no gradient is missing.
  // returns values [3, R] (norm, max_abs, inv_scale; float64 where a gradient is, else float32) and
  // counts [2, R] int64 (number of NaN and Inf, first bad tensor or -1)
  m.def(
      "group_grad_norm(Tensor[] grads, int[] rows, int[] position, float inv_scale, Tensor? inv_scale_tensor) "
      "-> (Tensor values, Tensor counts)");

  // the loss of kernels/reference.py: [B] = episodes, names and shapes as there; plan, and back, may also
  // be [B, C, H, W], one step, or [N, C], one episode of N cells, whose target is [N]. on: which of the terms (ce,
  // risk, ambiguity, agreement, anchor, prompt) count; what only the others read is looked at no further, but ce is
  // always told. annealed [7], float64, has weights and hard_floor in place of the numbers where it is given.
  // hard_mode: 0 episode, 1 cell, 2 none. terms [B, 8]: the six terms, hard ratio, accuracy. For backward: coef [B + 1,
  // 2], where row b is sigma_b over its cells and over its class weights and the last row begins with 1 / number of
  // episodes that count, and gradients d_* of what is small, finished but for that share and the upstream factor; those
  // of terms that are off are empty.
  m.def(
      "efe_loss(Tensor plan, Tensor target, Tensor? back, Tensor? preference, Tensor? anchor, Tensor? obs_entropy, "
      "Tensor? prompt_colors, Tensor? step_weight, Tensor? class_weight, Tensor? annealed, bool[6] on, "
      "float[] weights, float hard_floor, int hard_mode, int ignore_index) -> (Tensor loss, Tensor terms, "
      "Tensor solved, Tensor predicted, Tensor coef, Tensor d_pooled, Tensor d_obs_entropy, Tensor d_prompt_colors)");

  // efe_loss of [N, C] or [B, C, H, W] with its cross-entropy alone; ce, hard and accuracy [B] are columns of its terms
  m.def(
      "hard_cell_cross_entropy(Tensor logits, Tensor target, Tensor? class_weight, float hard_floor, int hard_mode, "
      "int ignore_index) -> (Tensor loss, Tensor ce, Tensor hard, Tensor accuracy, Tensor solved, Tensor predicted)");

  // gradients of plan, back, preference, obs_entropy and prompt_colors; empty where not needed. predicted: for mode 1
  m.def(
      "efe_loss_backward(Tensor grad, Tensor plan, Tensor target, Tensor? back, Tensor? preference, Tensor? anchor, "
      "Tensor? obs_entropy, Tensor? prompt_colors, Tensor? step_weight, Tensor? class_weight, Tensor? annealed, "
      "Tensor? predicted, Tensor coef, Tensor d_pooled, Tensor d_obs_entropy, Tensor d_prompt_colors, bool[6] on, "
      "float[] weights, float hard_floor, int hard_mode, int ignore_index, bool[5] needs) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");

  // scales the gradients of row r by inv_scale * min(1, max_norm[r] / (norm + 1e-6)), as measured into values; rows may
  // not overlap here. bounds: [R] float64 beside values, in place of the numbers: max_norm is empty then
  m.def("group_grad_clip_(Tensor(a!)[] grads, int[] rows, Tensor values, float[] max_norm, Tensor? bounds=None) -> ()");

  // the recurrence of qwen_fused/planner/plan_core.py: states [T, N, P, H, W, F] after each step, and words for
  // backward
  m.def(
      "plan_core(Tensor state, Tensor alive, Tensor scale, Tensor shift, Tensor norm, Tensor wz, Tensor bz, "
      "Tensor wc, Tensor bias, Tensor wu, int part, int steps) -> (Tensor states, Tensor workspace)");
  m.def(
      "plan_core_backward(Tensor grad, Tensor state, Tensor alive, Tensor scale, Tensor shift, Tensor norm, Tensor wz, "
      "Tensor wc, Tensor wu, Tensor states, Tensor workspace, int part) -> Tensor[]");
}

// for -D without quotes: the list of architectures has commas in it
#define QF_TEXT(...) QF_QUOTED(__VA_ARGS__)
#define QF_QUOTED(...) #__VA_ARGS__

// setup.py says for which
#ifndef QF_CUDA_ARCHITECTURES
#define QF_CUDA_ARCHITECTURES none
#endif

namespace {

pybind11::dict built_with() {
#ifdef __clang__
  const std::string compiler = "clang " __clang_version__;
#else
  const std::string compiler = c10::str("g++ ", __GNUC__, ".", __GNUC_MINOR__, ".", __GNUC_PATCHLEVEL__);
#endif
  pybind11::dict built;
  built["compiler"] = compiler;
  built["instruction sets"] = QF_INSTRUCTION_SETS;
  built["torch"] = TORCH_VERSION;
  built["CUDA architectures"] = QF_TEXT(QF_CUDA_ARCHITECTURES);
  return built;
}

}  // namespace

namespace {

// not by pybind11, which takes a microsecond for the arguments
PyMethodDef methods[] = {
    {"hard_cell_cross_entropy", reinterpret_cast<PyCFunction>(&qwen_fused::hard_cell_cross_entropy_direct),
     METH_FASTCALL,
     "The direct way to the op of the same name, with hard_mode by its name: the fields of EFEOutput, or None where a "
     "tensor, an argument or the moment is not plain."},
    {"measure_gradients", reinterpret_cast<PyCFunction>(&qwen_fused::measure_gradients), METH_FASTCALL,
     "(list of parameters, rows over it, inv_scale: number, tensor or None) -> what group_grad_norm gives for those "
     "that "
     "have a gradient, or None where there is none or one that is not plain."},
    {"clip_gradients", reinterpret_cast<PyCFunction>(&qwen_fused::clip_gradients), METH_FASTCALL,
     "(list of parameters, rows over it, values, bounds, their tensor or None) -> whether group_grad_clip_ scaled "
     "their gradients; not where there is none or one that is not plain."},
    {"remember_gradients", &qwen_fused::remember_gradients, METH_O,
     "List of parameters -> what `first_changed_gradient` asks for; holds no gradient alive."},
    {"first_changed_gradient", reinterpret_cast<PyCFunction>(&qwen_fused::first_changed_gradient), METH_FASTCALL,
     "(what was remembered, the same list) -> place of the first parameter whose gradient is another or was written to "
     "since, or -1."},
    {}};

}  // namespace

// the ops register themselves when the library is loaded
PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled ops, torch.ops.qwen_fused.*, and what they were built with.";
  if (PyModule_AddFunctions(m.ptr(), methods) != 0) throw pybind11::error_already_set();
  m.def(
      "built_with", &built_with, "Compiler, instruction sets, torch and CUDA architectures -> one line of text each.");
}

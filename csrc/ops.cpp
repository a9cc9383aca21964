// Schemas of every op in qwen_fused; each op's own file registers its implementation per device (TORCH_LIBRARY_IMPL).
#include <Python.h>
#include <torch/library.h>

TORCH_LIBRARY(qwen_fused, m) {
  // rows: triples (begin, end, base): row r covers grads[begin:end] and counts its first bad tensor from base.
  // position: place of each gradient in the full parameter list; empty when no gradient is missing.
  // returns values [3, R] (norm, max_abs, inv_scale; float64 where a gradient is, else float32) and
  // counts [2, R] int64 (number of NaN and Inf, first bad tensor or -1)
  m.def(
      "group_grad_norm(Tensor[] grads, int[] rows, int[] position, float inv_scale, Tensor? inv_scale_tensor) "
      "-> (Tensor values, Tensor counts)");

  // the loss of kernels/reference.py: [B] = episodes, names and shapes as there; optional arguments that are left out,
  // and weights (ce, risk, ambiguity, agreement, anchor, prompt) of exactly 0, drop their term. hard_mode: 0 episode, 1
  // cell, 2 none. terms [B, 8]: the six terms, hard ratio, accuracy. For backward: coef [B + 1, 2], where row b is
  // sigma_b over its cells and over its class weights and the last row begins with 1 / number of episodes that count,
  // and gradients d_* of what is small, finished but for that share and the upstream factor; those of terms that are
  // off are empty.
  m.def(
      "efe_loss(Tensor plan, Tensor target, Tensor? back, Tensor? preference, Tensor? anchor, Tensor? obs_entropy, "
      "Tensor? prompt_colors, Tensor? step_weight, Tensor? class_weight, float[] weights, float hard_floor, "
      "int hard_mode, int ignore_index) -> (Tensor loss, Tensor terms, Tensor solved, Tensor predicted, Tensor coef, "
      "Tensor d_pooled, Tensor d_obs_entropy, Tensor d_prompt_colors)");

  // gradients of plan, back, preference, obs_entropy and prompt_colors; empty where not needed. predicted: for mode 1
  m.def(
      "efe_loss_backward(Tensor grad, Tensor plan, Tensor target, Tensor? back, Tensor? preference, Tensor? anchor, "
      "Tensor? obs_entropy, Tensor? prompt_colors, Tensor? step_weight, Tensor? class_weight, Tensor? predicted, "
      "Tensor coef, Tensor d_pooled, Tensor d_obs_entropy, Tensor d_prompt_colors, float[] weights, float hard_floor, "
      "int hard_mode, int ignore_index, bool[5] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");

  // scales the gradients of row r by inv_scale * min(1, max_norm[r] / (norm + 1e-6)), as measured into values; rows may
  // not overlap here. bounds: [R] float64 beside values, in place of the numbers: max_norm is empty then
  m.def("group_grad_clip_(Tensor(a!)[] grads, int[] rows, Tensor values, float[] max_norm, Tensor? bounds=None) -> ()");
}

// the ops register themselves when the library is loaded; Python needs a module to import all the same
PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}

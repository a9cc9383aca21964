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

  // scales the gradients of row r by inv_scale * min(1, max_norm[r] / (norm + 1e-6)), as measured into values
  m.def("group_grad_clip_(Tensor(a!)[] grads, int[] rows, Tensor values, float[] max_norm) -> ()");
}

// the ops register themselves when the library is loaded; Python needs a module to import all the same
PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}

// Per-group gradient norms on CUDA: raw pointers and a stream, so that nvcc compiles the kernels without torch.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace qwen_fused::cuda {

enum class Kind : int32_t { f32, f64, f16, bf16 };

// one dense gradient in device memory
struct Gradient {
  void* data;
  int64_t numel;
  Kind kind;
  int32_t position;  // in the full parameter list, below 2^29
};

// gradients [begin, end); the first bad one is counted from base
struct Row {
  int64_t begin, end, base;
};

// what to multiply with: value, times *scalar where there is one
struct InvScale {
  double value;
  const void* scalar;
  bool scalar_is_double;
};

// bytes of device memory that grad_norm needs, 16-byte aligned
size_t grad_norm_workspace(const Gradient* grads, int64_t count);

// values [3, rows] (norm, max_abs, inv_scale), float or double; counts [2, rows] (nonfinite, first bad position or -1)
cudaError_t grad_norm(
    const Gradient* grads, int64_t count, const Row* rows, int64_t row_count, InvScale inv_scale, void* workspace,
    void* values, bool values_double, int64_t* counts, cudaStream_t stream);

// gradients of row r *= inv_scale * min(1, max_norm[r] / (norm + 1e-6)), read from values [3, columns]; columns >=
// row_count. bounds: in place of max_norm where it is not null, [row_count] on the device
cudaError_t grad_clip(
    const Gradient* grads, int64_t count, const Row* rows, int64_t row_count, const double* max_norm,
    const double* bounds, const void* values, bool values_double, int64_t columns, cudaStream_t stream);

}  // namespace qwen_fused::cuda

// The CUDA implementations of the gradient ops: checks, allocation on torch's stream, and the way to the kernels.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mul.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <vector>

#include "../common/apart.h"
#include "../common/checks.h"
#include "grad_norm_cuda.h"

namespace qwen_fused {
namespace {

cuda::Kind kind_of(const at::Tensor& grad) {
  switch (grad.scalar_type()) {
    case at::kFloat: return cuda::Kind::f32;
    case at::kDouble: return cuda::Kind::f64;
    case at::kHalf: return cuda::Kind::f16;
    default: return cuda::Kind::bf16;
  }
}

cuda::Gradient describe(const at::Tensor& grad, int64_t position) {
  return {grad.data_ptr(), grad.numel(), kind_of(grad), static_cast<int32_t>(position)};
}

std::vector<cuda::Row> rows_of(at::IntArrayRef rows) {
  std::vector<cuda::Row> out;
  for (size_t r = 0; r < rows.size(); r += 3) out.push_back({rows[r], rows[r + 1], rows[r + 2]});
  return out;
}

std::tuple<at::Tensor, at::Tensor> group_grad_norm(
    at::TensorList grads, at::IntArrayRef rows, at::IntArrayRef position, double inv_scale,
    const std::optional<at::Tensor>& inv_scale_tensor) {
  check_gradients(grads);
  check_rows(rows, grads.size());
  // without a gradient it is the scalar that brought the call here
  const at::Device device = grads.empty() ? inv_scale_tensor->device() : grads[0].device();
  check_inv_scale(inv_scale_tensor, device);
  check_position(position, grads.size());
  const c10::cuda::CUDAGuard guard(device);

  bool any_double = false;
  std::vector<at::Tensor> copies;  // of gradients with holes or overlaps
  std::vector<cuda::Gradient> gradients;
  gradients.reserve(grads.size());
  for (size_t t = 0; t < grads.size(); ++t) {
    any_double |= grads[t].scalar_type() == at::kDouble;
    const int64_t place = position.empty() ? static_cast<int64_t>(t) : position[t];
    if (grads[t].is_non_overlapping_and_dense()) {
      gradients.push_back(describe(grads[t], place));
    } else {
      copies.push_back(grads[t].contiguous());
      gradients.push_back(describe(copies.back(), place));
    }
  }

  const int64_t count = static_cast<int64_t>(gradients.size());
  const std::vector<cuda::Row> row_list = rows_of(rows);
  const int64_t R = static_cast<int64_t>(row_list.size());
  const auto options = at::TensorOptions().device(device);
  at::Tensor values = at::empty({3, R}, options.dtype(any_double ? at::kDouble : at::kFloat));
  at::Tensor counts = at::empty({2, R}, options.dtype(at::kLong));
  const int64_t bytes = static_cast<int64_t>(cuda::grad_norm_workspace(gradients.data(), count));
  const at::Tensor workspace = at::empty({bytes}, options.dtype(at::kByte));
  const cuda::InvScale scale = {
      inv_scale, inv_scale_tensor ? inv_scale_tensor->const_data_ptr() : nullptr,
      inv_scale_tensor && inv_scale_tensor->scalar_type() == at::kDouble};
  C10_CUDA_CHECK(
      cuda::grad_norm(
          gradients.data(), count, row_list.data(), R, scale, workspace.data_ptr(), values.data_ptr(), any_double,
          counts.data_ptr<int64_t>(), c10::cuda::getCurrentCUDAStream()));
  return {values, counts};
}

void group_grad_clip_(
    at::TensorList grads, at::IntArrayRef rows, const at::Tensor& values, at::ArrayRef<double> max_norm,
    const std::optional<at::Tensor>& bounds) {
  check_gradients(grads);
  check_rows(rows, grads.size());
  check_rows_apart(rows, grads.size());
  const at::Device device = grads.empty() ? values.device() : grads[0].device();
  check_values(values, rows, device);
  check_bounds(max_norm, bounds, values, rows);
  std::vector<int64_t> written;
  for (size_t r = 0; r < rows.size(); r += 3) {
    for (int64_t t = rows[r]; t < rows[r + 1]; ++t) written.push_back(t);
  }
  check_apart(grads, written);
  const c10::cuda::CUDAGuard guard(device);

  std::vector<cuda::Gradient> gradients;
  std::vector<at::Tensor> copies;
  std::vector<at::Tensor> copied;
  gradients.reserve(grads.size());
  for (const at::Tensor& grad : grads) {
    if (grad.is_non_overlapping_and_dense()) {
      gradients.push_back(describe(grad, 0));
    } else {
      copies.push_back(grad.contiguous());
      copied.push_back(grad);
      gradients.push_back(describe(copies.back(), 0));
    }
  }
  const std::vector<cuda::Row> row_list = rows_of(rows);
  const at::Tensor dense = values.contiguous();
  const at::Tensor limits = bounds ? bounds->contiguous() : at::Tensor();
  C10_CUDA_CHECK(
      cuda::grad_clip(
          gradients.data(), static_cast<int64_t>(gradients.size()), row_list.data(),
          static_cast<int64_t>(row_list.size()), max_norm.data(), bounds ? limits.const_data_ptr<double>() : nullptr,
          dense.const_data_ptr(), dense.scalar_type() == at::kDouble, dense.size(1),
          c10::cuda::getCurrentCUDAStream()));
  for (size_t i = 0; i < copies.size(); ++i) copied[i].copy_(copies[i]);
  // whether a factor is one is known on the device alone: what may have been written counts as written
  for (const cuda::Row& row : row_list) {
    for (int64_t t = row.begin; t < row.end; ++t) grads[t].unsafeGetTensorImpl()->bump_version();
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(qwen_fused, CUDA, m) {
  m.impl("group_grad_norm", &group_grad_norm);
  m.impl("group_grad_clip_", &group_grad_clip_);
}

}  // namespace qwen_fused

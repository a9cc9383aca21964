// What every gradient op asks of its arguments, said once.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <optional>
#include <vector>

namespace qwen_fused {

inline void check_gradients(at::TensorList grads) {
  for (size_t i = 0; i < grads.size(); ++i) {
    const at::Tensor& grad = grads[i];
    TORCH_CHECK_VALUE(grad.layout() == at::kStrided, "gradient ", i, " must be dense, got layout ", grad.layout());
    const auto type = grad.scalar_type();
    TORCH_CHECK_VALUE(
        type == at::kFloat || type == at::kDouble || type == at::kHalf || type == at::kBFloat16, "gradient ", i,
        " must be float16, bfloat16, float32 or float64, got ", type);
    TORCH_CHECK_VALUE(
        grad.device() == grads[0].device(), "gradients must share one device: gradient 0 is on ", grads[0].device(),
        ", gradient ", i, " on ", grad.device());
  }
}

// places in the full parameter list are below this: the CUDA kernels keep a gradient's type in the bits above
inline constexpr int64_t MAX_POSITION = int64_t{1} << 29;

// rows: triples (begin, end, base) into grads
inline void check_rows(at::IntArrayRef rows, size_t grads) {
  TORCH_CHECK_VALUE(rows.size() % 3 == 0, "rows must hold triples (begin, end, base), got ", rows.size(), " numbers");
  for (size_t r = 0; r < rows.size(); r += 3) {
    TORCH_CHECK_VALUE(
        0 <= rows[r] && rows[r] <= rows[r + 1] && rows[r + 1] <= static_cast<int64_t>(grads), "row ", r / 3,
        " must lie within the ", grads, " gradients, got [", rows[r], ", ", rows[r + 1], ")");
    TORCH_CHECK_VALUE(
        0 <= rows[r + 2] && rows[r + 2] < MAX_POSITION, "row ", r / 3, " must have its base in [0, 2^29), got ",
        rows[r + 2]);
  }
}

// rows to be written: a gradient in two of them would be scaled twice, by two threads at once
inline void check_rows_apart(at::IntArrayRef rows, size_t grads) {
  std::vector<int64_t> row_of(grads, -1);
  for (size_t r = 0; r < rows.size(); r += 3) {
    for (int64_t t = rows[r]; t < rows[r + 1]; ++t) {
      TORCH_CHECK_VALUE(
          row_of[t] < 0, "rows must not overlap, got gradient ", t, " in rows ", row_of[t], " and ", r / 3);
      row_of[t] = static_cast<int64_t>(r / 3);
    }
  }
}

// position: the place of each gradient in the full list, or empty
inline void check_position(at::IntArrayRef position, size_t grads) {
  TORCH_CHECK_VALUE(
      position.empty() || position.size() == grads, "position must name each of the ", grads, " gradients, got ",
      position.size());
  for (const int64_t place : position) {
    TORCH_CHECK_VALUE(0 <= place && place < MAX_POSITION, "position must hold places in [0, 2^29), got ", place);
  }
}

// values: as measured, [3, columns], of which the first belong to the rows
inline void check_values(const at::Tensor& values, at::IntArrayRef rows, at::Device device) {
  const int64_t R = static_cast<int64_t>(rows.size() / 3);
  TORCH_CHECK_VALUE(
      values.dim() == 2 && values.size(0) == 3 && values.size(1) >= R, "values must be [3, R] with R at least ", R,
      ", got ", values.sizes());
  TORCH_CHECK_VALUE(
      values.scalar_type() == at::kFloat || values.scalar_type() == at::kDouble,
      "values must be float32 or float64, got ", values.scalar_type());
  TORCH_CHECK_VALUE(
      values.device() == device, "values must be on ", device, " like the gradients, got ", values.device());
}

// a bound for each row: numbers, or in their place a tensor beside values
inline void check_bounds(
    at::ArrayRef<double> max_norm, const std::optional<at::Tensor>& bounds, const at::Tensor& values,
    at::IntArrayRef rows) {
  const int64_t R = static_cast<int64_t>(rows.size() / 3);
  TORCH_CHECK_VALUE(
      static_cast<int64_t>(max_norm.size()) == (bounds ? 0 : R), "max_norm must have one bound for each of the ", R,
      " rows, or none beside bounds, got ", max_norm.size());
  if (!bounds) return;
  TORCH_CHECK_VALUE(bounds->dim() == 1 && bounds->size(0) == R, "bounds must be [", R, "], got ", bounds->sizes());
  TORCH_CHECK_VALUE(bounds->scalar_type() == at::kDouble, "bounds must be float64, got ", bounds->scalar_type());
  TORCH_CHECK_VALUE(
      bounds->device() == values.device(), "bounds must be on ", values.device(), " like values, got ",
      bounds->device());
}

inline void check_inv_scale(const std::optional<at::Tensor>& inv_scale, at::Device device) {
  if (!inv_scale) return;
  TORCH_CHECK_VALUE(inv_scale->numel() == 1, "inv_scale must have one element, got ", inv_scale->sizes());
  TORCH_CHECK_VALUE(
      inv_scale->scalar_type() == at::kFloat || inv_scale->scalar_type() == at::kDouble,
      "inv_scale must be float32 or float64, got ", inv_scale->scalar_type());
  TORCH_CHECK_VALUE(
      inv_scale->device() == device, "inv_scale must be on ", device, " like the gradients, got ", inv_scale->device());
}

}  // namespace qwen_fused

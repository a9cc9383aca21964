// Per-group clipping on the CPU: unscaling and clipping in one write, and none where the factor is one.
#include <ATen/MemoryOverlap.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/mul.h>
#include <torch/library.h>

#include <limits>
#include <vector>

#include "../common/checks.h"
#include "../common/chunks.h"
#include "../common/vectorize.h"

namespace qwen_fused {
namespace {

using c10::BFloat16;
using c10::Half;

// the product is rounded once, to the gradient's type

QF_MULTIVERSION void scale_float(float* x, int64_t n, float factor) {
  for (int64_t i = 0; i < n; ++i) x[i] *= factor;
}

QF_MULTIVERSION void scale_double(double* x, int64_t n, double factor) {
  for (int64_t i = 0; i < n; ++i) x[i] *= factor;
}

QF_MULTIVERSION void scale_bf16(BFloat16* x, int64_t n, float factor) {
  for (int64_t i = 0; i < n; i += 8) {
    const int64_t bytes = std::min<int64_t>(n - i, 8) * sizeof(BFloat16);
    BFloat16 block[8] = {};
    std::memcpy(static_cast<void*>(block), x + i, bytes);
    const f32x8 v = load8(block) * factor;
    const u32x8 bits = bit_cast_to<u32x8>(v);
    // to nearest, ties to even; the sum would carry a NaN over into another number
    const u32x8 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const u32x8 kept = abs_bits(v) > 0x7f800000u ? (bits >> 16) | 0x40u : rounded;
    const u16x8 out = __builtin_convertvector(kept, u16x8);
    std::memcpy(static_cast<void*>(x + i), &out, bytes);
  }
}

void scale_half(Half* x, int64_t n, float factor) {
  for (int64_t i = 0; i < n; ++i) x[i] = static_cast<Half>(static_cast<float>(x[i]) * factor);
}

void scale_chunk(const Chunk& chunk, double factor) {
  switch (chunk.type) {
    case at::kFloat: return scale_float(static_cast<float*>(chunk.data), chunk.size, static_cast<float>(factor));
    case at::kBFloat16: return scale_bf16(static_cast<BFloat16*>(chunk.data), chunk.size, static_cast<float>(factor));
    case at::kHalf: return scale_half(static_cast<Half*>(chunk.data), chunk.size, static_cast<float>(factor));
    default: return scale_double(static_cast<double*>(chunk.data), chunk.size, factor);
  }
}

void group_grad_clip_(
    at::TensorList grads, at::IntArrayRef rows, const at::Tensor& values, at::ArrayRef<double> max_norm) {
  check_gradients(grads);
  check_rows(rows, grads.size());
  check_rows_apart(rows, grads.size());
  check_values(values, rows, max_norm, at::kCPU);
  const int64_t R = static_cast<int64_t>(max_norm.size());
  const at::Tensor measured = values.to(at::kDouble).contiguous();
  const double* const norm = measured.const_data_ptr<double>();
  const double* const inv_scale = norm + 2 * measured.size(1);
  std::vector<Chunk> chunks;
  std::vector<int64_t> with_holes;
  std::vector<double> factors(grads.size(), 1.0);
  for (int64_t r = 0; r < R; ++r) {
    const bool bounded = max_norm[r] != std::numeric_limits<double>::infinity();
    const double ratio = bounded ? max_norm[r] / (norm[r] + 1e-6) : 1.0;
    // written so that a NaN norm gives a NaN factor
    const double factor = inv_scale[r] * (ratio > 1.0 ? 1.0 : ratio);
    if (factor == 1.0) continue;
    for (int64_t t = rows[3 * r]; t < rows[3 * r + 1]; ++t) {
      factors[t] = factor;
      if (grads[t].is_non_overlapping_and_dense()) {
        append_chunks(chunks, grads[t], t);
      } else {
        TORCH_CHECK_VALUE(
            at::has_internal_overlap(grads[t]) != at::MemOverlap::Yes, "gradient ", t,
            " must not overlap itself to be scaled, got shape ", grads[t].sizes(), " of strides ", grads[t].strides());
        with_holes.push_back(t);
      }
    }
  }
  // nothing is written before everything is checked
  for (const int64_t t : with_holes) at::Tensor(grads[t]).mul_(factors[t]);
  for_each_chunk(chunks, [&](int64_t i) { scale_chunk(chunks[i], factors[chunks[i].tensor]); });
}

}  // namespace

TORCH_LIBRARY_IMPL(qwen_fused, CPU, m) { m.impl("group_grad_clip_", &group_grad_clip_); }

}  // namespace qwen_fused

// Per-group clipping on the CPU: unscaling and clipping in one write, and none where the factor is one.
#include <ATen/core/Tensor.h>
#include <ATen/ops/mul.h>
#include <torch/library.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <limits>
#include <vector>

#include "../common/apart.h"
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

// a product as a bfloat16 in the upper half of its bits: to nearest, ties to even; the sum would carry a NaN over into
// another number
QF_INLINE u32x8 rounded(f32x8 v) {
  const u32x8 bits = bit_cast_to<u32x8>(v);
  return abs_bits(v) > 0x7f800000u ? bits | 0x400000u : bits + 0x7fffu + ((bits >> 16) & 1u);
}

// sixteen at a time, those in even and those in odd places: no element has to change its lane
QF_INLINE void scale_sixteen(BFloat16* x, float factor) {
  const u32x8 pairs = load_as<u32x8>(x);
  const u32x8 even = rounded(bit_cast_to<f32x8>(pairs << 16) * factor);
  const u32x8 odd = rounded(bit_cast_to<f32x8>(pairs & 0xffff0000u) * factor);
  const u32x8 out = (even >> 16) | (odd & 0xffff0000u);
  std::memcpy(static_cast<void*>(x), &out, sizeof(out));
}

QF_MULTIVERSION void scale_bf16(BFloat16* x, int64_t n, float factor) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) scale_sixteen(x + i, factor);
  if (i == n) return;
  BFloat16 tail[16] = {};
  std::memcpy(static_cast<void*>(tail), x + i, (n - i) * sizeof(BFloat16));
  scale_sixteen(tail, factor);
  std::memcpy(static_cast<void*>(x + i), tail, (n - i) * sizeof(BFloat16));
}

void scale_half_tail(Half* x, int64_t n, float factor) {
  for (int64_t i = 0; i < n; ++i) x[i] = static_cast<Half>(static_cast<float>(x[i]) * factor);
}

#if defined(__x86_64__)
// compilers take this conversion element by element unless they are told of the instruction
__attribute__((target("avx2,f16c"))) void scale_half_avx2(Half* x, int64_t n, float factor) {
  const __m256 factors = _mm256_set1_ps(factor);
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    __m128i* const place = reinterpret_cast<__m128i*>(x + i);
    const __m256 product = _mm256_mul_ps(_mm256_cvtph_ps(_mm_loadu_si128(place)), factors);
    _mm_storeu_si128(place, _mm256_cvtps_ph(product, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  scale_half_tail(x + i, n - i, factor);
}

void scale_half(Half* x, int64_t n, float factor) {
  // every processor with AVX2 has F16C
  static const bool avx2 = __builtin_cpu_supports("avx2");
  return avx2 ? scale_half_avx2(x, n, factor) : scale_half_tail(x, n, factor);
}
#else
void scale_half(Half* x, int64_t n, float factor) { scale_half_tail(x, n, factor); }
#endif

void scale_chunk(const Chunk& chunk, double factor) {
  switch (chunk.type) {
    case at::kFloat: return scale_float(static_cast<float*>(chunk.data), chunk.size, static_cast<float>(factor));
    case at::kBFloat16: return scale_bf16(static_cast<BFloat16*>(chunk.data), chunk.size, static_cast<float>(factor));
    case at::kHalf: return scale_half(static_cast<Half*>(chunk.data), chunk.size, static_cast<float>(factor));
    default: return scale_double(static_cast<double*>(chunk.data), chunk.size, factor);
  }
}

// factor of each row, as torch.nn.utils.clip_grad_norm_ has it, times inv_scale
std::vector<double> factors_of(
    const at::Tensor& values, at::ArrayRef<double> max_norm, const std::optional<at::Tensor>& bounds, int64_t R) {
  const at::Tensor measured = values.to(at::kDouble).contiguous();
  const at::Tensor limits = bounds ? bounds->contiguous() : at::Tensor();
  const double* const limit = bounds ? limits.const_data_ptr<double>() : max_norm.data();
  const double* const norm = measured.const_data_ptr<double>();
  const double* const inv_scale = norm + 2 * measured.size(1);
  std::vector<double> factors;
  for (int64_t r = 0; r < R; ++r) {
    const bool bounded = limit[r] != std::numeric_limits<double>::infinity();
    // a bound under 0 is no bound: it must show
    const double bound = limit[r] < 0 ? std::numeric_limits<double>::quiet_NaN() : limit[r];
    const double ratio = bounded ? bound / (norm[r] + 1e-6) : 1.0;
    // written so that a NaN gives a NaN factor
    factors.push_back(inv_scale[r] * (ratio > 1.0 ? 1.0 : ratio));
  }
  return factors;
}

void group_grad_clip_(
    at::TensorList grads, at::IntArrayRef rows, const at::Tensor& values, at::ArrayRef<double> max_norm,
    const std::optional<at::Tensor>& bounds) {
  check_gradients(grads);
  check_rows(rows, grads.size());
  check_rows_apart(rows, grads.size());
  check_values(values, rows, at::kCPU);
  check_bounds(max_norm, bounds, values, rows);
  const int64_t R = static_cast<int64_t>(rows.size() / 3);
  const std::vector<double> factors = factors_of(values, max_norm, bounds, R);
  std::vector<Chunk> chunks;
  std::vector<int64_t> written;
  std::vector<int64_t> with_holes;
  std::vector<double> factor_of(grads.size(), 1.0);
  for (int64_t r = 0; r < R; ++r) {
    if (factors[r] == 1.0) continue;
    for (int64_t t = rows[3 * r]; t < rows[3 * r + 1]; ++t) {
      factor_of[t] = factors[r];
      written.push_back(t);
      if (grads[t].is_non_overlapping_and_dense()) {
        append_chunks(chunks, grads[t], t);
      } else {
        with_holes.push_back(t);
      }
    }
  }
  // nothing is written before everything is checked
  check_apart(grads, written);
  for (const int64_t t : written) grads[t].unsafeGetTensorImpl()->bump_version();
  for (const int64_t t : with_holes) at::Tensor(grads[t]).mul_(factor_of[t]);
  for_each_chunk(chunks, [&](int64_t i) { scale_chunk(chunks[i], factor_of[chunks[i].tensor]); });
}

}  // namespace

TORCH_LIBRARY_IMPL(qwen_fused, CPU, m) { m.impl("group_grad_clip_", &group_grad_clip_); }

}  // namespace qwen_fused

// Per-group gradient norms on the CPU: every gradient is read once, in fixed chunks, each into its own slot; the slots
// are then combined in order. The result does not depend on the number of threads.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../common/checks.h"
#include "../common/chunks.h"
#include "../common/vectorize.h"

namespace qwen_fused {
namespace {

using c10::BFloat16;
using c10::Half;

// a run of one gradient; sum of squares = sumsq * 4^exponent
struct Slot {
  double sumsq = 0;
  double max_abs = 0;
  int64_t nonfinite = 0;
  int exponent = 0;
};

// The one read: sum of squares, and the largest |g| as bits (NaN > Inf > every finite number). Where elements are alike
// their roundings are too, and add up: a lane takes BLOCK / 32 squares before the lanes are added pairwise, and what
// comes of that goes into a float64. A sum of squares is so within eleven roundings of its type, however long it is.
constexpr int64_t BLOCK = 256;

typedef float f32x4 __attribute__((vector_size(16)));

struct Halves {
  f32x4 low, high;
};

QF_INLINE f64x4 widened_sum(f32x8 v) {
  const Halves halves = bit_cast_to<Halves>(v);
  return __builtin_convertvector(halves.low + halves.high, f64x4);
}

struct Sixteen {
  f32x8 first, second;
};

template <class T>
QF_INLINE Sixteen load16(const T* x) {
  return {load8(x), load8(x + 8)};
}

// those in even and those in odd places: no element has to change its lane
QF_INLINE Sixteen load16(const BFloat16* x) {
  const u32x8 pairs = load_as<u32x8>(x);
  return {bit_cast_to<f32x8>(pairs << 16), bit_cast_to<f32x8>(pairs & 0xffff0000u)};
}

template <class T>
QF_INLINE void scan(const T* x, int64_t n, double* sumsq, uint32_t* max_bits) {
  f64x4 total{};
  u32x8 m0{}, m1{}, m2{}, m3{};
  int64_t i = 0;
  while (i + 32 <= n) {
    const int64_t end = std::min(i + BLOCK, n);
    f32x8 s0{}, s1{}, s2{}, s3{};
    for (; i + 32 <= end; i += 32) {
      // a page ahead, where the hardware's own prefetch stops
      for (size_t line = 0; line < 32 * sizeof(T); line += 64) {
        __builtin_prefetch(reinterpret_cast<const char*>(x + i) + 4096 + line);
      }
      const auto [a, b] = load16(x + i);
      const auto [c, d] = load16(x + i + 16);
      s0 += a * a, s1 += b * b, s2 += c * c, s3 += d * d;
      m0 = max_of(abs_bits(a), m0), m1 = max_of(abs_bits(b), m1);
      m2 = max_of(abs_bits(c), m2), m3 = max_of(abs_bits(d), m3);
    }
    total += widened_sum((s0 + s1) + (s2 + s3));
  }
  for (; i < n; i += 8) {
    T tail[8] = {};
    std::memcpy(static_cast<void*>(tail), x + i, std::min<int64_t>(n - i, 8) * sizeof(T));
    const f32x8 a = load8(tail);
    total += widened_sum(a * a);
    m0 = max_of(abs_bits(a), m0);
  }
  const u32x8 m = max_of(max_of(m0, m1), max_of(m2, m3));
  *sumsq = (total[0] + total[1]) + (total[2] + total[3]);
  *max_bits = 0;
  for (int lane = 0; lane < 8; ++lane) *max_bits = std::max(*max_bits, m[lane]);
}

QF_INLINE void scan(const double* x, int64_t n, double* sumsq, uint64_t* max_bits) {
  f64x4 total{};
  u64x4 m0{}, m1{};
  int64_t i = 0;
  while (i + 16 <= n) {
    const int64_t end = std::min(i + BLOCK, n);
    f64x4 s0{}, s1{}, s2{}, s3{};
    for (; i + 16 <= end; i += 16) {
      const f64x4 a = load_as<f64x4>(x + i), b = load_as<f64x4>(x + i + 4);
      const f64x4 c = load_as<f64x4>(x + i + 8), d = load_as<f64x4>(x + i + 12);
      s0 += a * a, s1 += b * b, s2 += c * c, s3 += d * d;
      m0 = max_of(max_of(abs_bits(a), abs_bits(c)), m0);
      m1 = max_of(max_of(abs_bits(b), abs_bits(d)), m1);
    }
    total += (s0 + s1) + (s2 + s3);
  }
  for (; i < n; i += 4) {
    double tail[4] = {};
    std::memcpy(tail, x + i, std::min<int64_t>(n - i, 4) * sizeof(double));
    const f64x4 a = load_as<f64x4>(tail);
    total += a * a;
    m0 = max_of(abs_bits(a), m0);
  }
  const u64x4 m = max_of(m0, m1);
  *sumsq = (total[0] + total[1]) + (total[2] + total[3]);
  *max_bits = std::max(std::max(m[0], m[1]), std::max(m[2], m[3]));
}

QF_MULTIVERSION void scan_float(const float* x, int64_t n, double* sumsq, uint32_t* max_bits) {
  scan(x, n, sumsq, max_bits);
}
QF_MULTIVERSION void scan_bf16(const BFloat16* x, int64_t n, double* sumsq, uint32_t* max_bits) {
  scan(x, n, sumsq, max_bits);
}
QF_MULTIVERSION void scan_half(const Half* x, int64_t n, double* sumsq, uint32_t* max_bits) {
  scan(x, n, sumsq, max_bits);
}
QF_MULTIVERSION void scan_double(const double* x, int64_t n, double* sumsq, uint64_t* max_bits) {
  scan(x, n, sumsq, max_bits);
}

// the rare second read, of a chunk whose squares leave the range or which holds NaN or Inf
template <class T>
Slot measure_carefully(const T* x, int64_t n) {
  Slot slot;
  for (int64_t i = 0; i < n; ++i) {
    const double magnitude = std::abs(static_cast<double>(x[i]));
    slot.nonfinite += !std::isfinite(magnitude);
    // NaN wins over everything, and stays
    if (std::isnan(magnitude) || magnitude > slot.max_abs) slot.max_abs = magnitude;
  }
  // hypot's answer for an infinity, and never a NaN hidden
  if (slot.nonfinite > 0) slot.sumsq = slot.max_abs;
  if (slot.nonfinite > 0 || slot.max_abs == 0) return slot;
  // squares of float32 and narrower always fit a double; those of a double fit once its largest is near one
  if constexpr (std::is_same_v<T, double>) std::frexp(slot.max_abs, &slot.exponent);
  for (int64_t i = 0; i < n; ++i) {
    const double v = std::ldexp(static_cast<double>(x[i]), -slot.exponent);
    slot.sumsq += v * v;
  }
  return slot;
}

// a square under 2^-126 loses bits; 2^15 of them vanish beside 2^-70
constexpr double TINY_FLOAT = 0x1p-70;
constexpr double TINY_DOUBLE = 0x1p-900;
// a sum of that many slots still fits float64; one of float32's squares always does, where no block overflowed
constexpr double LARGE = 0x1p900;

template <class T, class Bits>
Slot measure_chunk(const T* x, int64_t n, void (*scan_fn)(const T*, int64_t, double*, Bits*)) {
  constexpr bool narrow = sizeof(Bits) == sizeof(float);
  double sumsq;
  Bits max_bits;
  scan_fn(x, n, &sumsq, &max_bits);
  // false for NaN and Inf
  const bool in_range = sumsq <= LARGE;
  if (!in_range || (sumsq < (narrow ? TINY_FLOAT : TINY_DOUBLE) && max_bits != 0)) return measure_carefully(x, n);
  Slot slot;
  slot.sumsq = sumsq;
  slot.max_abs = bit_cast_to<std::conditional_t<narrow, float, double>>(max_bits);
  return slot;
}

Slot measure_chunk(const Chunk& chunk) {
  switch (chunk.type) {
    case at::kFloat: return measure_chunk(static_cast<const float*>(chunk.data), chunk.size, scan_float);
    case at::kBFloat16: return measure_chunk(static_cast<const BFloat16*>(chunk.data), chunk.size, scan_bf16);
    case at::kHalf: return measure_chunk(static_cast<const Half*>(chunk.data), chunk.size, scan_half);
    default: return measure_chunk(static_cast<const double*>(chunk.data), chunk.size, scan_double);
  }
}

void add(Slot& total, const Slot& slot) {
  if (total.exponent != slot.exponent && slot.sumsq != 0) {
    const int exponent = total.sumsq == 0 ? slot.exponent : std::max(total.exponent, slot.exponent);
    total.sumsq = std::ldexp(total.sumsq, 2 * (total.exponent - exponent));
    total.sumsq += std::ldexp(slot.sumsq, 2 * (slot.exponent - exponent));
    total.exponent = exponent;
  } else {
    total.sumsq += slot.sumsq;
  }
  if (std::isnan(slot.max_abs) || slot.max_abs > total.max_abs) total.max_abs = slot.max_abs;
  total.nonfinite += slot.nonfinite;
}

double read_scalar(const std::optional<at::Tensor>& scalar) {
  if (!scalar) return 1.0;
  return scalar->scalar_type() == at::kDouble ? *scalar->const_data_ptr<double>() : *scalar->const_data_ptr<float>();
}

std::tuple<at::Tensor, at::Tensor> group_grad_norm(
    at::TensorList grads, at::IntArrayRef rows, at::IntArrayRef position, double inv_scale,
    const std::optional<at::Tensor>& inv_scale_tensor) {
  check_gradients(grads);
  check_rows(rows, grads.size());
  check_position(position, grads.size());
  check_inv_scale(inv_scale_tensor, at::kCPU);

  const int64_t tensors = static_cast<int64_t>(grads.size());
  bool any_double = false;
  std::vector<at::Tensor> copies;  // of gradients with holes or overlaps: kept alive until they are read
  std::vector<Chunk> chunks;
  chunks.reserve(tensors);
  for (int64_t t = 0; t < tensors; ++t) {
    any_double |= grads[t].scalar_type() == at::kDouble;
    if (grads[t].is_non_overlapping_and_dense()) {
      append_chunks(chunks, grads[t], t);
    } else {
      copies.push_back(grads[t].contiguous());
      append_chunks(chunks, copies.back(), t);
    }
  }

  std::vector<Slot> slots(chunks.size());
  for_each_chunk(chunks, [&](int64_t i) { slots[i] = measure_chunk(chunks[i]); });

  std::vector<Slot> per_tensor(tensors);
  for (size_t i = 0; i < chunks.size(); ++i) add(per_tensor[chunks[i].tensor], slots[i]);

  const int64_t R = static_cast<int64_t>(rows.size() / 3);
  at::Tensor values = at::empty({3, R}, any_double ? at::kDouble : at::kFloat);
  at::Tensor counts = at::empty({2, R}, at::kLong);
  int64_t* const nonfinite = counts.data_ptr<int64_t>();
  inv_scale *= read_scalar(inv_scale_tensor);
  const auto put = [&](int64_t row, int64_t r, double value) {
    if (any_double) {
      values.data_ptr<double>()[row * R + r] = value;
    } else {
      values.data_ptr<float>()[row * R + r] = static_cast<float>(value);
    }
  };
  for (int64_t r = 0; r < R; ++r) {
    Slot total;
    int64_t first = -1;
    for (int64_t t = rows[3 * r]; t < rows[3 * r + 1]; ++t) {
      if (first < 0 && per_tensor[t].nonfinite > 0) first = (position.empty() ? t : position[t]) - rows[3 * r + 2];
      add(total, per_tensor[t]);
    }
    put(0, r, std::ldexp(std::sqrt(total.sumsq) * std::abs(inv_scale), total.exponent));
    put(1, r, total.max_abs * std::abs(inv_scale));
    put(2, r, inv_scale);
    nonfinite[r] = total.nonfinite;
    nonfinite[R + r] = first;
  }
  return {values, counts};
}

}  // namespace

TORCH_LIBRARY_IMPL(qwen_fused, CPU, m) { m.impl("group_grad_norm", &group_grad_norm); }

}  // namespace qwen_fused

// Per-group clipping on CUDA: unscaling and clipping in one write; a block whose factor is one touches no gradient.
#include <cuda_fp16.h>

#include "multi_tensor.cuh"

namespace qwen_fused::cuda {
namespace {

__device__ __forceinline__ float scaled(float x, double, float factor) { return x * factor; }
__device__ __forceinline__ double scaled(double x, double factor, float) { return x * factor; }

__device__ __forceinline__ __half scaled(__half x, double, float factor) {
  return __float2half_rn(__half2float(x) * factor);
}

// bits of a bfloat16
struct Bf16 {
  uint16_t bits;
};

__device__ __forceinline__ Bf16 scaled(Bf16 x, double, float factor) {
  const uint32_t bits = __float_as_uint(__uint_as_float(static_cast<uint32_t>(x.bits) << 16) * factor);
  // to nearest, ties to even; the carry would turn a NaN into another number
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>(bits >> 16 | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

template <class T>
__device__ __forceinline__ void scale_chunk(T* x, int n, double factor) {
  constexpr int N = 16 / sizeof(T);
  const float narrow = static_cast<float>(factor);
  const int thread = threadIdx.x;
  const int misaligned = static_cast<int>(reinterpret_cast<uintptr_t>(x) % 16 / sizeof(T));
  const int head = min(n, (N - misaligned) % N);
  const int vectors = (n - head) / N;
  const int tail = head + vectors * N;
  if (thread < head) x[thread] = scaled(x[thread], factor, narrow);
  if (tail + thread < n) x[tail + thread] = scaled(x[tail + thread], factor, narrow);

  uint4* const v = reinterpret_cast<uint4*>(x + head);
#pragma unroll 2
  for (int i = thread; i < vectors; i += THREADS) {
    uint4 packed = v[i];
    T items[N];
    memcpy(static_cast<void*>(items), &packed, 16);
#pragma unroll
    for (int item = 0; item < N; ++item) items[item] = scaled(items[item], factor, narrow);
    memcpy(&packed, static_cast<void*>(items), 16);
    v[i] = packed;
  }
}

// as torch.nn.utils.clip_grad_norm_; a NaN norm, and a bound under 0, give a NaN factor, so that nothing is hidden
template <class T>
__device__ __forceinline__ double factor_of(
    const T* values, const double* bounds, int64_t columns, uint32_t row, double bound) {
  const double inv_scale = values[2 * columns + row];
  if (bounds != nullptr) bound = bounds[row];
  if (bound == INFINITY) return inv_scale;
  const double ratio = (bound < 0 ? NAN : bound) / (static_cast<double>(values[row]) + 1e-6);
  return inv_scale * (ratio > 1.0 ? 1.0 : ratio);
}

__global__ void __launch_bounds__(THREADS, 6) clip_kernel(
    const __grid_constant__ Batch batch, const void* values, const double* bounds, bool values_double,
    int64_t columns) {
  const Chunk chunk = find_chunk(batch, blockIdx.x);
  const uint32_t row = batch.tag[chunk.tensor] & TAG_MASK;
  const float bound = batch.bound[chunk.tensor];
  const double factor = values_double ? factor_of(static_cast<const double*>(values), bounds, columns, row, bound)
                                      : factor_of(static_cast<const float*>(values), bounds, columns, row, bound);
  if (factor == 1.0) return;
  char* const data = static_cast<char*>(batch.data[chunk.tensor]);
  switch (static_cast<Kind>(batch.tag[chunk.tensor] >> TAG_BITS)) {
    case Kind::f32: return scale_chunk(reinterpret_cast<float*>(data) + chunk.begin, chunk.size, factor);
    case Kind::f64: return scale_chunk(reinterpret_cast<double*>(data) + chunk.begin, chunk.size, factor);
    case Kind::f16: return scale_chunk(reinterpret_cast<__half*>(data) + chunk.begin, chunk.size, factor);
    default: return scale_chunk(reinterpret_cast<Bf16*>(data) + chunk.begin, chunk.size, factor);
  }
}

}  // namespace

cudaError_t grad_clip(
    const Gradient* grads, int64_t count, const Row* rows, int64_t row_count, const double* max_norm,
    const double* bounds, const void* values, bool values_double, int64_t columns, cudaStream_t stream) {
  // rows do not overlap: the caller checked
  std::vector<uint32_t> row_of(count, TAG_MASK);
  for (int64_t r = 0; r < row_count; ++r) {
    for (int64_t i = rows[r].begin; i < rows[r].end; ++i) row_of[i] = static_cast<uint32_t>(r);
  }
  std::vector<Gradient> clipped;
  std::vector<uint32_t> rows_of_clipped;
  for (int64_t i = 0; i < count; ++i) {
    if (row_of[i] == TAG_MASK) continue;
    clipped.push_back(grads[i]);
    rows_of_clipped.push_back(row_of[i]);
  }
  return for_each_batch(
      clipped.data(), static_cast<int64_t>(clipped.size()), [&](int64_t i) { return rows_of_clipped[i]; },
      [&](int64_t i) { return bounds != nullptr ? 0.0f : static_cast<float>(max_norm[rows_of_clipped[i]]); },
      [&](const Batch& batch, unsigned blocks, int64_t) {
        return launch(clip_kernel, blocks, THREADS, stream, batch, values, bounds, values_double, columns);
      });
}

}  // namespace qwen_fused::cuda

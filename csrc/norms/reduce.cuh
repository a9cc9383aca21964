// Sums and maxima over a warp and over a block, in a fixed order.
#pragma once

#include <cuda_runtime.h>

namespace qwen_fused::cuda {

__device__ __forceinline__ float larger(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ double larger(double a, double b) { return fmax(a, b); }
__device__ __forceinline__ int larger(int a, int b) { return max(a, b); }

template <class T>
__device__ __forceinline__ T warp_sum(T value) {
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

template <class T>
__device__ __forceinline__ T warp_max(T value) {
  for (int offset = 16; offset > 0; offset /= 2) value = larger(value, __shfl_xor_sync(0xffffffffu, value, offset));
  return value;
}

// every thread gets the total; scratch has a place per warp and must not be in use by an earlier reduction
template <class T, int N>
__device__ __forceinline__ T block_sum(T value, T (&scratch)[N]) {
  value = warp_sum(value);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  T total = scratch[0];
  for (int warp = 1; warp < N; ++warp) total += scratch[warp];
  return total;
}

template <class T, int N>
__device__ __forceinline__ T block_max(T value, T (&scratch)[N]) {
  value = warp_max(value);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  T largest = scratch[0];
  for (int warp = 1; warp < N; ++warp) largest = larger(largest, scratch[warp]);
  return largest;
}

}  // namespace qwen_fused::cuda

// Sums and maxima over a warp and over a block, in a fixed order.
#pragma once

#include <cuda_runtime.h>

namespace qwen_fused::cuda {

__device__ __forceinline__ float larger(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ double larger(double a, double b) { return fmax(a, b); }
__device__ __forceinline__ int larger(int a, int b) { return max(a, b); }

struct Add {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a + b;
  }
};

struct Larger {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return larger(a, b);
  }
};

// every thread gets the result; scratch has a place per warp and must not be in use by an earlier reduction
template <class T, int N, class Op>
__device__ __forceinline__ T block_reduce(T value, T (&scratch)[N], const Op& op) {
  for (int offset = 16; offset > 0; offset /= 2) value = op(value, __shfl_xor_sync(0xffffffffu, value, offset));
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  T result = scratch[0];
  for (int warp = 1; warp < N; ++warp) result = op(result, scratch[warp]);
  return result;
}

template <class T, int N>
__device__ __forceinline__ T block_sum(T value, T (&scratch)[N]) {
  return block_reduce(value, scratch, Add());
}

template <class T, int N>
__device__ __forceinline__ T block_max(T value, T (&scratch)[N]) {
  return block_reduce(value, scratch, Larger());
}

}  // namespace qwen_fused::cuda

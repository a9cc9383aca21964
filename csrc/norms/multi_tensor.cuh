// Many tensors in one launch: their addresses travel as a kernel argument, each block finds its chunk by binary search.
//
// A kernel argument needs no copy to the device, no lifetime and no sync, and a CUDA graph replays it; 32 KiB of it
// (CUDA 12.1) describe every tensor of a 72B Qwen. A launch more is made only for what does not fit.
#pragma once

#include <algorithm>
#include <vector>

#include "grad_norm_cuda.h"

namespace qwen_fused::cuda {

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;
// a block's share; at 2 TB/s and more a block takes some 20 us over it, so the last ones leave the device idle for
// under 2 %
constexpr int64_t CHUNK_BYTES = 1 << 17;

#if CUDART_VERSION >= 12010
constexpr int MAX_TENSORS = 1150;
constexpr size_t MAX_ARGUMENT = 32600;
#else
constexpr int MAX_TENSORS = 140;
constexpr size_t MAX_ARGUMENT = 4000;
#endif

struct Batch {
  void* data[MAX_TENSORS];
  int64_t numel[MAX_TENSORS];
  int32_t first_chunk[MAX_TENSORS + 1];  // of each tensor; ends with the number of blocks
  uint32_t tag[MAX_TENSORS];             // kind in the upper three bits, below them what the kernel wants to know
  float bound[MAX_TENSORS];              // clip only
  int32_t count;
};
static_assert(sizeof(Batch) <= MAX_ARGUMENT, "a kernel argument holds 4 KiB, 32 KiB from CUDA 12.1 on");

constexpr int TAG_BITS = 29;
constexpr uint32_t TAG_MASK = (1u << TAG_BITS) - 1;

__host__ __device__ inline int64_t item_size(Kind kind) { return kind == Kind::f64 ? 8 : kind == Kind::f32 ? 4 : 2; }

inline int64_t chunks_of(const Gradient& grad) {
  const int64_t items = CHUNK_BYTES / item_size(grad.kind);
  return (grad.numel + items - 1) / items;
}

struct Chunk {
  int tensor;
  int64_t begin;  // first element
  int size;       // elements
};

__device__ __forceinline__ Chunk find_chunk(const Batch& batch, int block) {
  // the last tensor that starts at or before this block; empty tensors start where their successor does
  int low = 0;
  int high = batch.count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (batch.first_chunk[middle] <= block) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  const Kind kind = static_cast<Kind>(batch.tag[low] >> TAG_BITS);
  const int64_t items = CHUNK_BYTES / item_size(kind);
  const int64_t begin = (block - batch.first_chunk[low]) * items;
  const int64_t left = batch.numel[low] - begin;
  return {low, begin, static_cast<int>(left < items ? left : items)};
}

// fill and launch one batch after another; tag(i), bound(i) say what goes with gradient i
template <class Tag, class Bound, class Launch>
cudaError_t for_each_batch(
    const Gradient* grads, int64_t count, const Tag& tag, const Bound& bound, const Launch& launch) {
  int64_t first_slot = 0;
  for (int64_t begin = 0; begin < count;) {
    Batch batch;
    batch.count = 0;
    int64_t blocks = 0;
    int64_t i = begin;
    for (; i < count && batch.count < MAX_TENSORS; ++i) {
      const int64_t chunks = chunks_of(grads[i]);
      // the grid's limit; one tensor alone would need 128 TiB to reach it
      if (blocks + chunks > INT32_MAX) break;
      const int place = batch.count++;
      batch.data[place] = grads[i].data;
      batch.numel[place] = grads[i].numel;
      batch.first_chunk[place] = static_cast<int32_t>(blocks);
      batch.tag[place] = static_cast<uint32_t>(grads[i].kind) << TAG_BITS | (tag(i) & TAG_MASK);
      batch.bound[place] = bound(i);
      blocks += chunks;
    }
    if (i == begin) return cudaErrorInvalidValue;
    batch.first_chunk[batch.count] = static_cast<int32_t>(blocks);
    if (blocks > 0) {
      const cudaError_t error = launch(batch, static_cast<unsigned>(blocks), first_slot);
      if (error != cudaSuccess) return error;
    }
    first_slot += blocks;
    begin = i;
  }
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t launch(
    void (*kernel)(Parameters...), unsigned blocks, unsigned threads, cudaStream_t stream,
    const Arguments&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

}  // namespace qwen_fused::cuda

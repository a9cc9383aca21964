// CUDA on the host, as far as the kernels in csrc/ need it: a block is so many real threads, its barriers are theirs, and so the
// sanitizers see what a device would do. Blocks run one after another; QF_REVERSE_BLOCKS=1 runs them the other way round.
#pragma once

#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <memory>
#include <thread>
#include <tuple>
#include <vector>

#ifndef CUDART_VERSION
#define CUDART_VERSION 12010
#endif
#define __global__
#define __host__
#define __device__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
// one block at a time: what belongs to the block can belong to the program
#define __shared__ static

using std::max;
using std::min;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

inline thread_local dim3 threadIdx, blockIdx;

namespace cuda_shim {

// Two in turn. ThreadSanitizer takes a thread that leaves a barrier late to have seen what faster threads did before they came to
// that barrier again, and would miss races between the two.
class Barrier {
 public:
  explicit Barrier(unsigned threads) {
    for (pthread_barrier_t& barrier : barriers_) pthread_barrier_init(&barrier, nullptr, threads);
  }
  ~Barrier() {
    for (pthread_barrier_t& barrier : barriers_) pthread_barrier_destroy(&barrier);
  }
  Barrier(const Barrier&) = delete;
  Barrier& operator=(const Barrier&) = delete;
  void wait(unsigned turn) { pthread_barrier_wait(&barriers_[turn % 2]); }

 private:
  pthread_barrier_t barriers_[2];
};

struct Warp {
  explicit Warp(unsigned lanes) : barrier(lanes) {}
  Barrier barrier;
  // two sets in turn: a slow lane may still read one while a fast lane fills the other
  uint64_t exchange[2][32] = {};
};

struct Block {
  explicit Block(unsigned threads) : barrier(threads) {
    for (unsigned begin = 0; begin < threads; begin += 32) {
      warps.push_back(std::make_unique<Warp>(std::min(32u, threads - begin)));
    }
  }
  Barrier barrier;
  std::vector<std::unique_ptr<Warp>> warps;
};

inline thread_local Block* block = nullptr;
// how often this thread came to each kind of barrier
inline thread_local unsigned barriers = 0;
inline thread_local unsigned shuffles = 0;

}  // namespace cuda_shim

inline void __syncthreads() { cuda_shim::block->barrier.wait(cuda_shim::barriers++); }

template <class T>
T __shfl_xor_sync(uint32_t, T value, int mask) {
  cuda_shim::Warp& warp = *cuda_shim::block->warps[threadIdx.x / 32];
  const unsigned turn = cuda_shim::shuffles++;
  uint64_t* const exchange = warp.exchange[turn % 2];
  static_assert(sizeof(T) <= sizeof(uint64_t));
  memcpy(&exchange[threadIdx.x % 32], &value, sizeof(T));
  warp.barrier.wait(turn);
  memcpy(&value, &exchange[threadIdx.x % 32 ^ mask], sizeof(T));
  return value;
}

template <class T>
T __ldg(const T* from) {
  return *from;
}

inline float __uint_as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  const unsigned blocks = config->gridDim.x;
  const std::tuple<Parameters...> parameters(arguments...);
  const bool reversed = getenv("QF_REVERSE_BLOCKS") != nullptr;
  cuda_shim::Block shared(config->blockDim.x);
  std::vector<std::thread> threads;
  for (unsigned thread = 0; thread < config->blockDim.x; ++thread) {
    threads.emplace_back([&, thread] {
      cuda_shim::block = &shared;
      threadIdx = dim3(thread, 0, 0);
      for (unsigned i = 0; i < blocks; ++i) {
        blockIdx = dim3(reversed ? blocks - 1 - i : i, 0, 0);
        std::apply(kernel, parameters);
        __syncthreads();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  return cudaSuccess;
}

// Gradients cut into chunks, and threads that work them off.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <vector>

#include "turns.h"

namespace qwen_fused {

// 128 KiB of float32: two passes over it stay in the second-level cache
inline constexpr int64_t CHUNK = 1 << 15;
// under this many elements (0.1 ms for one thread) waking the others costs more than it saves, above all on a busy
// machine
inline constexpr int64_t SERIAL = 1 << 19;

struct Chunk {
  void* data;
  int64_t size;
  int64_t tensor;
  at::ScalarType type;
};

inline void append_chunks(std::vector<Chunk>& chunks, const at::Tensor& grad, int64_t tensor) {
  char* data = static_cast<char*>(grad.data_ptr());
  const int64_t numel = grad.numel();
  const int64_t item = static_cast<int64_t>(grad.element_size());
  for (int64_t at = 0; at < numel; at += CHUNK) {
    chunks.push_back({data + at * item, std::min(CHUNK, numel - at), tensor, grad.scalar_type()});
  }
}

template <class F>
void for_each_chunk(const std::vector<Chunk>& chunks, const F& f) {
  const int64_t count = static_cast<int64_t>(chunks.size());
  int64_t elements = 0;
  for (const Chunk& chunk : chunks) elements += chunk.size;
  const int64_t threads = elements < SERIAL ? 1 : std::min<int64_t>(at::get_num_threads(), count);
  if (threads <= 1) {
    for (int64_t i = 0; i < count; ++i) f(i);
    return;
  }
  // neighbours together, up to 8 MiB: memory is read a quarter faster in long runs than in turns with the other threads
  const int64_t most = std::clamp<int64_t>(count / (8 * threads), 1, 64);
  in_turns(count, threads, most, [&](const auto& take) {
    for (int64_t begin, end; take(begin, end);) {
      for (int64_t i = begin; i < end; ++i) f(i);
    }
  });
}

}  // namespace qwen_fused

// Threads that take parts of some work as they come free: with equal shares, one that another program holds up would
// keep all of them waiting.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace qwen_fused {

// calls work(take) on each thread, where take(begin, end) says whether there is more of [0, count), and which part:
// `most` at a time, less towards the end
template <class Work>
void in_turns(int64_t count, int64_t threads, int64_t most, const Work& work) {
  // relaxed: it orders nothing but itself, so that a sanitizer sees what races beside it
  constexpr auto relaxed = std::memory_order_relaxed;
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    work([&](int64_t& begin, int64_t& end) {
      begin = next.load(relaxed);
      do {
        if (begin >= count) return false;
        end = begin + std::clamp<int64_t>((count - begin) / (2 * threads), 1, most);
      } while (!next.compare_exchange_weak(begin, end, relaxed));
      return true;
    });
  });
}

}  // namespace qwen_fused

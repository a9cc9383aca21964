// torch's parallel_for over threads that ThreadSanitizer sees. The real one is libgomp's, whose barriers are bare
// futexes: to the sanitizer every loop would race with what follows it. Found before torch's header of this name.
#pragma once

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

namespace at {

inline int get_num_threads() { return 4; }

// whatever the grain: a small case then races where a large one would
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t, const F& f) {
  const int64_t threads = std::min<int64_t>(get_num_threads(), end - begin);
  std::vector<std::thread> others;
  const auto bound = [&](int64_t thread) { return begin + (end - begin) * thread / threads; };
  for (int64_t thread = 1; thread < threads; ++thread) {
    others.emplace_back([&, thread] { f(bound(thread), bound(thread + 1)); });
  }
  if (threads > 0) f(begin, bound(1));
  for (std::thread& other : others) other.join();
}

}  // namespace at

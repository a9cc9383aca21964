// Gradients that are to be scaled must not share memory: what two of them hold would be scaled twice.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <c10/util/SmallVector.h>

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

namespace qwen_fused {

// Whether two indices may lead to one element: each stride must step over all that the smaller ones reach. Odd strides
// that interleave without meeting are taken for overlapping.
inline bool overlaps_itself(const at::Tensor& x) {
  if (x.is_non_overlapping_and_dense() || x.numel() == 0) return false;
  c10::SmallVector<std::pair<int64_t, int64_t>, 8> axes;
  for (int64_t d = 0; d < x.dim(); ++d) {
    if (x.size(d) > 1) axes.emplace_back(x.stride(d), x.size(d));
  }
  std::sort(axes.begin(), axes.end());
  int64_t reached = 0;
  for (const auto& [stride, size] : axes) {
    if (stride <= reached) return true;
    reached += stride * (size - 1);
  }
  return false;
}

// Whether any two are views of one storage, in a table with room for four times as many: sorting would take ten times
// as long.
inline bool any_shared_storage(at::TensorList grads, const std::vector<int64_t>& places) {
  size_t size = 16;
  while (size < 4 * places.size()) size *= 2;
  std::vector<const void*> table(size, nullptr);
  for (const int64_t place : places) {
    const void* const memory = grads[place].storage().data();
    if (memory == nullptr) continue;
    size_t slot = (reinterpret_cast<uintptr_t>(memory) >> 4) * uint64_t{0x9E3779B97F4A7C15} >> 20 & (size - 1);
    for (; table[slot] != nullptr; slot = (slot + 1) & (size - 1)) {
      if (table[slot] == memory) return true;
    }
    table[slot] = memory;
  }
  return false;
}

// Refuse to scale gradients at `places` where one overlaps itself, begins where another does, or begins inside a dense
// one. Two with holes that interleave, as columns of one matrix do, are apart.
inline void check_apart(at::TensorList grads, const std::vector<int64_t>& places) {
  for (const int64_t place : places) {
    TORCH_CHECK_VALUE(
        !overlaps_itself(grads[place]), "gradient ", place, " must not overlap itself to be scaled, got shape ",
        grads[place].sizes(), " of strides ", grads[place].strides());
  }
  if (!any_shared_storage(grads, places)) return;
  struct Span {
    uintptr_t begin, end;
    int64_t place;
  };
  std::vector<Span> spans;
  for (const int64_t place : places) {
    const at::Tensor& x = grads[place];
    if (x.numel() == 0) continue;
    const auto begin = reinterpret_cast<uintptr_t>(x.const_data_ptr());
    const size_t bytes = x.is_non_overlapping_and_dense() ? x.nbytes() : 1;
    spans.push_back({begin, begin + bytes, place});
  }
  std::sort(spans.begin(), spans.end(), [](const Span& a, const Span& b) { return a.begin < b.begin; });
  // the one that reaches furthest so far
  const Span* last = nullptr;
  for (const Span& span : spans) {
    TORCH_CHECK_VALUE(
        last == nullptr || span.begin >= last->end, "gradients must lie in memory of their own to be scaled, got ",
        std::min(last->place, span.place), " and ", std::max(last->place, span.place), " in the same");
    if (last == nullptr || span.end > last->end) last = &span;
  }
}

}  // namespace qwen_fused

// One call of the loss as the tiles see it: arguments, and a tile's labels.
#pragma once

#include <algorithm>
#include <cstdint>

#include "efe_cells.h"

namespace qwen_fused {

inline constexpr int MAX_CLASSES = 64;
// cells a thread takes at a time
inline constexpr int64_t TILE = 256;
// vectors between a load or store and its prefetch: 2 T C rows are read in turn, more than the hardware follows
inline constexpr int64_t AHEAD = 4;
inline constexpr double LN_2 = 0.69314718055994530942;
inline constexpr int IGNORED = -1;
inline constexpr int OUT_OF_RANGE = -2;
inline constexpr uint8_t IGNORED_PREDICTION = 255;

enum Term { CE, RISK, AMBIGUITY, AGREEMENT, ANCHOR, PROMPT, TERMS };
enum HardMode { HARD_EPISODE, HARD_CELL, HARD_NONE };
// head of a slot; behind it stand the probability mass [C] and the pooled logits [T, C]
enum Slot { S_CELLS, S_HARD, S_BAD, S_KAPPA, S_CE, S_RISK, S_AGREEMENT, S_ANCHOR, S_HEAD };

template <class T>
struct LaneInt;
template <>
struct LaneInt<float> {
  using type = int32_t;
};
template <>
struct LaneInt<double> {
  using type = int64_t;
};

template <class T>
struct Job {
  int64_t B, steps, classes, cells, tiles;
  at::Tensor target;
  Cells<T> plan, back, preference, anchor;
  const T *obs_entropy, *step_weight, *class_weight;  // null where left out
  bool on[TERMS];
  double weight[TERMS];
  double hard_floor;
  int hard_mode;
  int64_t ignore_index;
  uint8_t* predicted;
  // backward
  Cells<T> d_plan, d_back, d_preference;
  const T *coef, *d_pooled;  // [B, 2]; [B, steps, C], null where the prompt term is off
  double upstream;

  int64_t slot_size() const { return S_HEAD + (on[AMBIGUITY] ? classes : 0) + (on[PROMPT] ? steps * classes : 0); }
  double step(int64_t t) const {
    if (step_weight == nullptr) return t == steps - 1;
    return step_weight[t];
  }
};

// labels and class weights of a tile, padded with ignored cells to a whole vector
template <class T>
struct Labels {
  using Int = typename LaneInt<T>::type;
  alignas(64) Int label[TILE];
  alignas(64) T kappa[TILE];
  int64_t valid = 0, bad = 0;

  Labels(const Job<T>& job, int64_t b, int64_t begin, int64_t size) {
    switch (job.target.scalar_type()) {
      case at::kByte: read<uint8_t>(job, b, begin, size); break;
      case at::kChar: read<int8_t>(job, b, begin, size); break;
      case at::kShort: read<int16_t>(job, b, begin, size); break;
      case at::kInt: read<int32_t>(job, b, begin, size); break;
      default: read<int64_t>(job, b, begin, size); break;
    }
    for (int64_t i = size; i < std::min(TILE, size + MAX_LANES); ++i) label[i] = IGNORED, kappa[i] = 0;
  }

 private:
  template <class S>
  void read(const Job<T>& job, int64_t b, int64_t begin, int64_t size) {
    const int64_t W = job.target.size(2), stride_h = job.target.stride(1), stride_w = job.target.stride(2);
    const S* const from = job.target.template const_data_ptr<S>() + b * job.target.stride(0);
    for (int64_t i = 0; i < size; ++i) {
      const int64_t at = begin + i;
      const int64_t o = static_cast<int64_t>(from[at / W * stride_h + at % W * stride_w]);
      const bool counts = o != job.ignore_index, in_range = o >= 0 && o < job.classes;
      label[i] = !counts ? IGNORED : in_range ? static_cast<Int>(o) : OUT_OF_RANGE;
      kappa[i] = !counts || !in_range ? T(0) : job.class_weight ? job.class_weight[o] : T(1);
      valid += counts, bad += counts && !in_range;
    }
  }
};

}  // namespace qwen_fused

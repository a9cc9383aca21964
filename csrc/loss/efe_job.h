// One call of the loss as the tiles see it: plain data, no torch.
#pragma once

#include <array>
#include <cstdint>

namespace qwen_fused {

inline constexpr int MAX_CLASSES = 64;
// cells that go through the steps together
inline constexpr int64_t TILE = 256;
// largest number of cells in a vector: float32 in 64 bytes
inline constexpr int MAX_LANES = 16;
inline constexpr double LN_2 = 0.69314718055994530942;
// logits are summed in this scale, so that the largest numbers there are can be
inline constexpr double POOL = 0x1p-20;
inline constexpr int IGNORED = -1;
inline constexpr int OUT_OF_RANGE = -2;
inline constexpr uint8_t IGNORED_PREDICTION = 255;

enum Term { CE, RISK, AMBIGUITY, AGREEMENT, ANCHOR, PROMPT, TERMS };
enum HardMode { HARD_EPISODE, HARD_CELL, HARD_NONE };
// head of a slot; behind it stand the probability mass [C] and the pooled logits [T, C]
enum Slot { S_CELLS, S_HARD, S_BAD, S_KAPPA, S_CE, S_RISK, S_AGREEMENT, S_ANCHOR, S_HEAD };

enum class Type : uint8_t { f32, f64, f16, bf16, u8, i8, i16, i32, i64 };

// a [B, T, C, H, W] tensor of any strides and dtype, whose axes b, t and c may be absent: their stride is then 0
struct Strided {
  void* data = nullptr;
  Type type = Type::f32;
  int64_t stride_b = 0, stride_t = 0, stride_c = 0, stride_h = 0, stride_w = 0;
  int64_t classes = 0, width = 1;
  // one axis of cells, stride_w apart
  bool flat = true;

  bool there() const { return data != nullptr; }
};

template <class T>
struct Job {
  int64_t B, steps, classes, cells, tiles;
  Strided target, plan, back, preference, anchor;
  const T *obs_entropy, *step_weight, *class_weight;  // null where left out
  // what counts in the loss; the cross-entropy is told even where it does not
  std::array<bool, TERMS> on;
  double weight[TERMS];
  double hard_floor;
  int hard_mode;
  int64_t ignore_index;
  uint8_t* predicted;
  // backward
  Strided d_plan, d_back, d_preference;
  const T *coef, *d_pooled;  // [B, 2]; [B, steps, C] with the upstream factor in it
  double upstream;

  int64_t slot_size() const { return S_HEAD + (on[AMBIGUITY] ? classes : 0) + (on[PROMPT] ? steps * classes : 0); }
  // places a thread works in: four per cell and class of a tile; pooled logits [T, C, lanes]
  int64_t scratch_size() const { return 4 * classes * TILE + (on[PROMPT] ? steps * classes * MAX_LANES : 0); }
  double step(int64_t t) const {
    if (step_weight == nullptr) return t == steps - 1;
    return step_weight[t];
  }
};

// the loss on tile `unit` of B * tiles: forward fills the tile's slot and its predictions, backward its gradients;
// scratch, aligned to 64 bytes, holds nothing from one tile to the next
template <class T>
struct TileFunctions {
  void (*forward)(const Job<T>& job, int64_t unit, T* scratch, double* slot);
  void (*backward)(const Job<T>& job, int64_t unit, T* scratch);
};

// those for the best instruction set of this machine
template <class T>
TileFunctions<T> tile_functions();

}  // namespace qwen_fused

// The loss's tiles without torch, two threads over every tile of odd canvases and class counts, for `make sanitize`:
// torch's OpenMP is not instrumented, so ThreadSanitizer could say nothing true of it. With -DPLANT_RACE all tiles
// share a slot, and with -DPLANT_OVERRUN the labels are one short: a sanitizer that lets those pass is asleep.
#include <cstdio>
#include <random>
#include <thread>
#include <vector>

#include "efe_job.h"

using namespace qwen_fused;

namespace {

std::vector<float> normal(int64_t size) {
  std::vector<float> x(size);
  std::mt19937 engine(static_cast<unsigned>(size));
  std::normal_distribution<float> draw;
  for (float& value : x) value = draw(engine);
  return x;
}

void both_directions(int64_t B, int64_t T, int64_t C, int64_t P) {
  auto plan = normal(B * T * C * P), back = normal(B * T * C * P), preference = normal(B * C * P);
  auto anchor = normal(C * P), pooled_share = normal(B * T * C);
  std::vector<float> d_plan(plan.size()), d_back(back.size()), d_preference(preference.size());
  std::vector<float> coef(2 * (B + 1), 1e-3f), entropy(C, 0.5f);
  std::vector<uint8_t> predicted(B * P);
#ifdef PLANT_OVERRUN
  std::vector<int64_t> target(B * P - 1);
#else
  std::vector<int64_t> target(B * P);
#endif
  for (size_t i = 0; i < target.size(); ++i) target[i] = i % 5 == 0 ? -100 : static_cast<int64_t>(i) % C;

  const auto cells = [&](std::vector<float>& x, int64_t b, int64_t t) {
    Strided s;
    s.data = x.data(), s.stride_b = b, s.stride_t = t, s.stride_c = P, s.stride_h = P, s.stride_w = 1;
    s.classes = C, s.width = P;
    return s;
  };
  Job<float> job{};
  job.B = B, job.steps = T, job.classes = C, job.cells = P, job.tiles = (P + TILE - 1) / TILE;
  job.target.data = target.data(), job.target.type = Type::i64, job.target.width = P;
  job.target.stride_b = P, job.target.stride_h = P, job.target.stride_w = 1;
  job.plan = cells(plan, T * C * P, C * P), job.back = cells(back, T * C * P, C * P);
  job.preference = cells(preference, C * P, 0), job.anchor = cells(anchor, 0, 0);
  job.d_plan = cells(d_plan, T * C * P, C * P), job.d_back = cells(d_back, T * C * P, C * P);
  job.d_preference = cells(d_preference, C * P, 0);
  for (int term = 0; term < TERMS; ++term) job.weight[term] = 0.5, job.on[term] = true;
  job.obs_entropy = entropy.data(), job.coef = coef.data(), job.d_pooled = pooled_share.data();
  job.hard_mode = HARD_CELL, job.hard_floor = 0.5, job.ignore_index = -100;
  job.predicted = predicted.data(), job.upstream = 1;

  const auto tile = tile_functions<float>();
  const int64_t units = B * job.tiles, size = job.slot_size();
  std::vector<double> slots(units * size);
  for (const bool forward : {true, false}) {
    const auto every_other = [&](int64_t first) {
      std::vector<float> pooled(T * C * MAX_LANES);
      for (int64_t unit = first; unit < units; unit += 2) {
#ifdef PLANT_RACE
        double* const slot = slots.data();
#else
        double* const slot = slots.data() + unit * size;
#endif
        if (forward)
          tile.forward(job, unit, pooled.data(), slot);
        else
          tile.backward(job, unit);
      }
    };
    std::thread one(every_other, 0), other(every_other, 1);
    one.join(), other.join();
  }
}

}  // namespace

int main() {
  for (const int64_t C : {1, 2, 10, 64}) {
    for (const int64_t P : {1, 9, 17, 256, 300}) both_directions(3, 3, C, P);
  }
  std::puts("clean");
}

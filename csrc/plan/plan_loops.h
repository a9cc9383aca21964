// The loops of a planning step that are not matrix products; the mathematics is in qwen_fused/planner/plan_core.py.
//
// Rows are cells: state [N, P, H, W, F], P palettes side by side. z [R, Z] holds parts of c features each: looked for
// to the right, left, below, above, anywhere, along lines, and, where P > 1, across the palettes; then m features
// that the eight neighbours see. A row of `a` [R, Q] is what the step's matrix sees of a cell: its own F features, 9m
// of its neighbourhood, then 7c (9c) of context.
#pragma once

#include <cmath>
#include <cstdint>

#include "../common/vectorize.h"

namespace qwen_fused {

struct PlanShape {
  int64_t N, P, H, W, F, c, m, Z, Q, hidden;
  // where a's context begins
  int64_t context() const { return F + 9 * m; }
  int64_t rows() const { return N * P * H * W; }
  int64_t images() const { return N * P; }
};

inline constexpr double RMS_EPSILON = 1e-6;
// offsets of a 3x3 neighbourhood, row by row
inline constexpr int64_t TAPS = 9;

template <class T>
QF_INLINE T inverse_rms(const T* s, int64_t F) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t f = 0; f < F; ++f) sum += s[f] * s[f];
  return T(1) / std::sqrt(sum / T(F) + T(RMS_EPSILON));
}

// x = s / rms(s) * norm on living cells, 0 on others
template <class T>
QF_INLINE void rms_rows(const PlanShape& p, const T* s, const T* norm, const T* alive, T* x) {
  const int64_t cells = p.H * p.W;
  for (int64_t row = 0; row < p.rows(); ++row, s += p.F, x += p.F) {
    const T live = alive[row / (p.P * cells) * cells + row % cells];
    const T inverse = live * inverse_rms(s, p.F);
    for (int64_t f = 0; f < p.F; ++f) x[f] = s[f] * inverse * norm[f];
  }
}

// ds += the gradient through rms_rows; d_norm += its own
template <class T>
QF_INLINE void rms_rows_backward(
    const PlanShape& p, const T* s, const T* norm, const T* alive, const T* dx, T* ds, T* d_norm) {
  const int64_t cells = p.H * p.W;
  for (int64_t row = 0; row < p.rows(); ++row, s += p.F, dx += p.F, ds += p.F) {
    if (alive[row / (p.P * cells) * cells + row % cells] == 0) continue;
    const T inverse = inverse_rms(s, p.F);
    T dot = 0;
#pragma omp simd reduction(+ : dot)
    for (int64_t f = 0; f < p.F; ++f) dot += dx[f] * norm[f] * s[f];
    const T along = dot * inverse * inverse * inverse / T(p.F);
    for (int64_t f = 0; f < p.F; ++f) {
      ds[f] += dx[f] * norm[f] * inverse - s[f] * along;
      d_norm[f] += dx[f] * s[f] * inverse;
    }
  }
}

// calls body(tap, row of the neighbour) for the neighbours inside the canvas, skip(tap) for the others
template <class Body, class Skip>
QF_INLINE void for_neighbours(
    const PlanShape& p, int64_t row, int64_t i, int64_t j, const Body& body, const Skip& skip) {
  for (int64_t tap = 0; tap < TAPS; ++tap) {
    const int64_t di = tap / 3 - 1, dj = tap % 3 - 1;
    if (i + di < 0 || i + di >= p.H || j + dj < 0 || j + dj >= p.W) {
      skip(tap);
    } else {
      body(tap, row + di * p.W + dj);
    }
  }
}

// a's first F columns are x, the next 9m the m last features of z around the cell
template <class T>
QF_INLINE void local_rows(const PlanShape& p, const T* x, const T* z, T* a) {
  const int64_t F = p.F, m = p.m, near = p.Z - m;
  int64_t row = 0;
  for (int64_t image = 0; image < p.images(); ++image) {
    for (int64_t i = 0; i < p.H; ++i) {
      for (int64_t j = 0; j < p.W; ++j, ++row) {
        T* out = a + row * p.Q;
        for (int64_t f = 0; f < F; ++f) out[f] = x[row * F + f];
        for_neighbours(
            p, row, i, j,
            [&](int64_t tap, int64_t other) QF_INLINE_LAMBDA {
              const T* from = z + other * p.Z + near;
              for (int64_t f = 0; f < m; ++f) out[F + tap * m + f] = from[f];
            },
            [&](int64_t tap) QF_INLINE_LAMBDA {
              for (int64_t f = 0; f < m; ++f) out[F + tap * m + f] = 0;
            });
      }
    }
  }
}

// dz's m last features = through local_rows: a cell is the opposite neighbour of its neighbours
template <class T>
QF_INLINE void local_rows_backward(const PlanShape& p, const T* da, T* dz) {
  const int64_t F = p.F, m = p.m, near = p.Z - m;
  int64_t row = 0;
  for (int64_t image = 0; image < p.images(); ++image) {
    for (int64_t i = 0; i < p.H; ++i) {
      for (int64_t j = 0; j < p.W; ++j, ++row) {
        T* to = dz + row * p.Z + near;
        for (int64_t f = 0; f < m; ++f) to[f] = 0;
        for_neighbours(
            p, row, i, j,
            [&](int64_t tap, int64_t other) QF_INLINE_LAMBDA {
              const T* d = da + other * p.Q + F + (TAPS - 1 - tap) * m;
              for (int64_t f = 0; f < m; ++f) to[f] += d[f];
            },
            [](int64_t) QF_INLINE_LAMBDA {});
      }
    }
  }
}

// z = max(z + bias, 0) on living cells, 0 on others, in place
template <class T>
QF_INLINE void relu_rows(const PlanShape& p, const T* bias, const T* alive, T* z) {
  const int64_t cells = p.H * p.W;
  for (int64_t row = 0; row < p.rows(); ++row, z += p.Z) {
    const T live = alive[row / (p.P * cells) * cells + row % cells];
    for (int64_t f = 0; f < p.Z; ++f) {
      const T value = (z[f] + bias[f]) * live;
      z[f] = value > 0 ? value : T(0);
    }
  }
}

// u = (pre + bias) * scale + shift, scale and shift [N, hidden]; pre takes its bias in place
template <class T>
QF_INLINE void film_rows(const PlanShape& p, T* pre, const T* bias, const T* scale, const T* shift, T* u) {
  const int64_t per = p.P * p.H * p.W;
  for (int64_t row = 0; row < p.rows(); ++row, pre += p.hidden, u += p.hidden) {
    const T *scales = scale + row / per * p.hidden, *shifts = shift + row / per * p.hidden;
    for (int64_t f = 0; f < p.hidden; ++f) {
      pre[f] += bias[f];
      u[f] = pre[f] * scales[f] + shifts[f];
    }
  }
}

// du becomes the gradient of pre in place; d_scale, d_shift [N, hidden] += theirs
template <class T>
QF_INLINE void film_rows_backward(
    const PlanShape& p, const T* pre, const T* scale, T* du, T* d_scale, T* d_shift, T* d_bias) {
  const int64_t per = p.P * p.H * p.W;
  for (int64_t row = 0; row < p.rows(); ++row, pre += p.hidden, du += p.hidden) {
    const int64_t at = row / per * p.hidden;
    for (int64_t f = 0; f < p.hidden; ++f) {
      d_scale[at + f] += du[f] * pre[f];
      d_shift[at + f] += du[f];
      du[f] *= scale[at + f];
      d_bias[f] += du[f];
    }
  }
}

// rows of dead cells to 0, in place
template <class T>
QF_INLINE void mask_rows(const PlanShape& p, const T* alive, T* rows, int64_t width) {
  const int64_t cells = p.H * p.W;
  for (int64_t row = 0; row < p.rows(); ++row, rows += width) {
    if (alive[row / (p.P * cells) * cells + row % cells] != 0) continue;
    for (int64_t f = 0; f < width; ++f) rows[f] = 0;
  }
}

}  // namespace qwen_fused

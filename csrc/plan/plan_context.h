// What a cell sees of the whole grid: running maxima along its lines, the largest anywhere, means, and across palettes.
#pragma once

#include <cstdint>

#include "plan_loops.h"

namespace qwen_fused {

// one line of `count` cells, `step` rows apart: a's column is the largest so far of z's
template <class T>
QF_INLINE void running_max(const PlanShape& p, const T* z, T* a, int64_t count, int64_t step) {
  for (int64_t f = 0; f < p.c; ++f) a[f] = z[f];
  for (int64_t k = 1; k < count; ++k) {
    const T *from = z + k * step * p.Z, *before = a + (k - 1) * step * p.Q;
    T* to = a + k * step * p.Q;
    for (int64_t f = 0; f < p.c; ++f) to[f] = from[f] >= before[f] ? from[f] : before[f];
  }
}

// a gradient goes to the last cell that was the largest so far, as in torch.cummax
template <class T>
QF_INLINE void running_max_backward(
    const PlanShape& p, const T* z, const T* a, const T* da, T* dz, T* sum, int64_t count, int64_t step) {
  for (int64_t f = 0; f < p.c; ++f) sum[f] = 0;
  for (int64_t k = count - 1; k >= 0; --k) {
    const T *own = z + k * step * p.Z, *most = a + k * step * p.Q, *d = da + k * step * p.Q;
    T* to = dz + k * step * p.Z;
    for (int64_t f = 0; f < p.c; ++f) {
      const T all = sum[f] + d[f];
      const bool here = own[f] == most[f];
      to[f] = here ? all : T(0);
      sum[f] = here ? T(0) : all;
    }
  }
}

// z's parts spread over a's context columns; counts [N, H + W]: living cells of each row and column, at least 1.
// room: [3 * (H + W) * c]
template <class T>
QF_INLINE void context_rows(const PlanShape& p, const T* z_all, const T* counts, T* a_all, T* room) {
  const int64_t c = p.c, cells = p.H * p.W, H = p.H, W = p.W;
  for (int64_t image = 0; image < p.images(); ++image) {
    const T* z = z_all + image * cells * p.Z;
    T* a = a_all + image * cells * p.Q + p.context();
    const T* count = counts + image / p.P * (H + W);
    for (int64_t i = 0; i < H; ++i) {
      running_max(p, z + i * W * p.Z, a + i * W * p.Q, W, 1);
      running_max(p, z + ((i + 1) * W - 1) * p.Z + c, a + ((i + 1) * W - 1) * p.Q + c, W, -1);
    }
    for (int64_t j = 0; j < W; ++j) {
      running_max(p, z + j * p.Z + 2 * c, a + j * p.Q + 2 * c, H, W);
      running_max(p, z + ((H - 1) * W + j) * p.Z + 3 * c, a + ((H - 1) * W + j) * p.Q + 3 * c, H, -W);
    }
    T *most = room, *rows = room + c, *columns = rows + H * c;
    for (int64_t f = 0; f < (1 + H + W) * c; ++f) room[f] = 0;
    for (int64_t i = 0; i < H; ++i) {
      for (int64_t j = 0; j < W; ++j) {
        const T *whole = z + (i * W + j) * p.Z + 4 * c, *line = whole + c;
        for (int64_t f = 0; f < c; ++f) {
          most[f] = whole[f] > most[f] ? whole[f] : most[f];
          rows[i * c + f] += line[f];
          columns[j * c + f] += line[f];
        }
      }
    }
    for (int64_t i = 0; i < H; ++i) {
      for (int64_t j = 0; j < W; ++j) {
        T* to = a + (i * W + j) * p.Q + 4 * c;
        for (int64_t f = 0; f < c; ++f) {
          to[f] = most[f];
          to[c + f] = rows[i * c + f] / count[i];
          to[2 * c + f] = columns[j * c + f] / count[H + j];
        }
      }
    }
  }
  if (p.P == 1) return;
  for (int64_t n = 0; n < p.N; ++n) {
    for (int64_t cell = 0; cell < cells; ++cell) {
      const int64_t first = n * p.P * cells + cell;
      T *sum = room, *most = room + c;
      for (int64_t f = 0; f < 2 * c; ++f) room[f] = 0;
      for (int64_t k = 0; k < p.P; ++k) {
        const T* own = z_all + (first + k * cells) * p.Z + 6 * c;
        for (int64_t f = 0; f < c; ++f) {
          sum[f] += own[f];
          most[f] = own[f] > most[f] ? own[f] : most[f];
        }
      }
      for (int64_t k = 0; k < p.P; ++k) {
        T* to = a_all + (first + k * cells) * p.Q + p.context() + 7 * c;
        for (int64_t f = 0; f < c; ++f) {
          to[f] = sum[f] / T(p.P);
          to[c + f] = most[f];
        }
      }
    }
  }
}

// dz = through context_rows, and 0 where z is. A largest value that several cells share is shared by its gradient
template <class T>
QF_INLINE void context_rows_backward(
    const PlanShape& p, const T* z_all, const T* a_all, const T* counts, const T* da_all, T* dz_all, T* room) {
  const int64_t c = p.c, cells = p.H * p.W, H = p.H, W = p.W;
  for (int64_t image = 0; image < p.images(); ++image) {
    const int64_t z_at = image * cells * p.Z, a_at = image * cells * p.Q + p.context();
    const T *z = z_all + z_at, *a = a_all + a_at, *da = da_all + a_at;
    T* dz = dz_all + z_at;
    const T* count = counts + image / p.P * (H + W);
    const auto line = [&](int64_t cell, int64_t part, int64_t length, int64_t step) QF_INLINE_LAMBDA {
      const int64_t in = cell * p.Z + part * c, out = cell * p.Q + part * c;
      running_max_backward(p, z + in, a + out, da + out, dz + in, room, length, step);
    };
    for (int64_t i = 0; i < H; ++i) {
      line(i * W, 0, W, 1);
      line((i + 1) * W - 1, 1, W, -1);
    }
    for (int64_t j = 0; j < W; ++j) {
      line(j, 2, H, W);
      line((H - 1) * W + j, 3, H, -W);
    }
    T *d_most = room, *sharers = room + c, *d_rows = room + 2 * c, *d_columns = d_rows + H * c;
    for (int64_t f = 0; f < (2 + H + W) * c; ++f) room[f] = 0;
    for (int64_t i = 0; i < H; ++i) {
      for (int64_t j = 0; j < W; ++j) {
        const int64_t cell = i * W + j;
        const T *d = da + cell * p.Q + 4 * c, *most = a + cell * p.Q + 4 * c, *own = z + cell * p.Z + 4 * c;
        for (int64_t f = 0; f < c; ++f) {
          d_most[f] += d[f];
          sharers[f] += own[f] == most[f] ? T(1) : T(0);
          d_rows[i * c + f] += d[c + f];
          d_columns[j * c + f] += d[2 * c + f];
        }
      }
    }
    for (int64_t i = 0; i < H; ++i) {
      for (int64_t j = 0; j < W; ++j) {
        const int64_t cell = i * W + j;
        const T *most = a + cell * p.Q + 4 * c, *own = z + cell * p.Z + 4 * c;
        T* to = dz + cell * p.Z + 4 * c;
        for (int64_t f = 0; f < c; ++f) {
          to[f] = own[f] == most[f] ? d_most[f] / (sharers[f] > 0 ? sharers[f] : T(1)) : T(0);
          to[c + f] = d_rows[i * c + f] / count[i] + d_columns[j * c + f] / count[H + j];
        }
      }
    }
  }
  if (p.P > 1) {
    for (int64_t n = 0; n < p.N; ++n) {
      for (int64_t cell = 0; cell < cells; ++cell) {
        const int64_t first = n * p.P * cells + cell;
        T *d_sum = room, *d_most = room + c, *sharers = room + 2 * c;
        for (int64_t f = 0; f < 3 * c; ++f) room[f] = 0;
        for (int64_t k = 0; k < p.P; ++k) {
          const int64_t row = first + k * cells;
          const T *d = da_all + row * p.Q + p.context() + 7 * c, *most = a_all + row * p.Q + p.context() + 8 * c;
          const T* own = z_all + row * p.Z + 6 * c;
          for (int64_t f = 0; f < c; ++f) {
            d_sum[f] += d[f];
            d_most[f] += d[c + f];
            sharers[f] += own[f] == most[f] ? T(1) : T(0);
          }
        }
        for (int64_t k = 0; k < p.P; ++k) {
          const int64_t row = first + k * cells;
          const T *most = a_all + row * p.Q + p.context() + 8 * c, *own = z_all + row * p.Z + 6 * c;
          T* to = dz_all + row * p.Z + 6 * c;
          for (int64_t f = 0; f < c; ++f) {
            const T share = own[f] == most[f] ? d_most[f] / (sharers[f] > 0 ? sharers[f] : T(1)) : T(0);
            to[f] = d_sum[f] / T(p.P) + share;
          }
        }
      }
    }
  }
  for (int64_t k = 0; k < p.rows() * p.Z; ++k) dz_all[k] = z_all[k] > 0 ? dz_all[k] : T(0);
}

}  // namespace qwen_fused

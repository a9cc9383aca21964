// The loss on one tile of cells, each cell in a lane of its own and classes in a loop, once per instruction set and
// chosen at run time.
//
// The headers below have no include guard: each set includes them again, inside a namespace of its own and under its
// own target pragma. A target attribute on the caller would not do: vector types wider than the baseline's are lowered
// to scalars before anything is inlined.
#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <utility>

#include "../common/vectorize.h"
#include "efe_job.h"

// a lower one tests the code for lesser machines on this one
#ifndef QF_BEST_LEVEL
#define QF_BEST_LEVEL 4
#endif

#if defined(__x86_64__) && !defined(__clang__) && __GNUC__ >= 12
#define QF_LEVELS 1
#include <immintrin.h>
#endif

// for _mm512_undefined_ps inside the compiler's own header (GCC bug 105593)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

namespace qwen_fused {
namespace {

#define QF_LEVEL 1
namespace baseline {
#include "efe_math.h"
//
#include "efe_cells.h"
//
#include "efe_softmax.h"
//
#include "efe_backward.h"
#include "efe_forward.h"
template <class T>
using Lanes = Simd<T, 16>;
}  // namespace baseline
#undef QF_LEVEL

#ifdef QF_LEVELS
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
#define QF_LEVEL 3
namespace avx2 {
#include "efe_math.h"
//
#include "efe_cells.h"
//
#include "efe_softmax.h"
//
#include "efe_backward.h"
#include "efe_forward.h"
template <class T>
using Lanes = Simd<T, 32>;
}  // namespace avx2
#undef QF_LEVEL
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
#define QF_LEVEL 4
namespace avx512 {
#include "efe_math.h"
//
#include "efe_cells.h"
//
#include "efe_softmax.h"
//
#include "efe_backward.h"
#include "efe_forward.h"
template <class T>
using Lanes = Simd<T, 64>;
}  // namespace avx512
#undef QF_LEVEL
#pragma GCC pop_options
#endif

}  // namespace

template <class T>
TileFunctions<T> tile_functions() {
#ifdef QF_LEVELS
  if (QF_BEST_LEVEL >= 4 && __builtin_cpu_supports("x86-64-v4")) {
    return {&avx512::forward_tile<avx512::Lanes<T>>, &avx512::backward_tile<avx512::Lanes<T>>};
  }
  if (QF_BEST_LEVEL >= 3 && __builtin_cpu_supports("x86-64-v3")) {
    return {&avx2::forward_tile<avx2::Lanes<T>>, &avx2::backward_tile<avx2::Lanes<T>>};
  }
#endif
  return {&baseline::forward_tile<baseline::Lanes<T>>, &baseline::backward_tile<baseline::Lanes<T>>};
}

template TileFunctions<float> tile_functions<float>();
template TileFunctions<double> tile_functions<double>();

}  // namespace qwen_fused

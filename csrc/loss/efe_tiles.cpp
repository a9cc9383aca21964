// The loss on one tile of cells, each cell in a lane of its own and classes in a loop, once per instruction set and
// chosen at run time. levels/ has the code.
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

#ifdef QF_LEVELS
#include <immintrin.h>
#endif

// for _mm512_undefined_ps inside the compiler's own header (GCC bug 105593)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

namespace qwen_fused {
namespace {

#define QF_LEVEL 1
#define QF_BYTES 16
namespace baseline {
#include "levels/level.inc.h"
}  // namespace baseline

#ifdef QF_LEVELS
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
#define QF_LEVEL 3
#define QF_BYTES 32
namespace avx2 {
#include "levels/level.inc.h"
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
#define QF_LEVEL 4
#define QF_BYTES 64
namespace avx512 {
#include "levels/level.inc.h"
}  // namespace avx512
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

// Portable SIMD: fixed-width compiler vectors, compiled once per instruction set and chosen when the library is loaded.
//
// QF_MULTIVERSION goes on a plain (non-template) function; everything it calls in its hot loop must be QF_INLINE, so
// that it is compiled again for AVX-512 and AVX2. One binary then runs on any x86-64, which -march=native would not:
// wheels are cached and containers are moved between machines. Elsewhere (aarch64, other compilers) the vectors still
// become what the target has.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <cstring>

#define QF_INLINE __attribute__((always_inline)) inline
#define QF_INLINE_LAMBDA __attribute__((always_inline))

// QF_LEVELS: the loss's tiles (loss/levels/) are compiled once for each set as well
#if defined(__x86_64__) && !defined(__clang__) && __GNUC__ >= 12
#define QF_LEVELS 1
#endif

#if defined(QF_LEVELS) && defined(__linux__)
#define QF_MULTIVERSION __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define QF_INSTRUCTION_SETS "x86-64-v4, x86-64-v3, x86-64"
#elif defined(__x86_64__) && defined(__linux__) && (!defined(__clang__) || __clang_major__ >= 14)
#define QF_MULTIVERSION __attribute__((target_clones("avx512f", "avx2", "default")))
#define QF_INSTRUCTION_SETS "gradient norms: AVX-512, AVX2, x86-64; loss: the compiler's target"
#else
#define QF_MULTIVERSION
#define QF_INSTRUCTION_SETS "the compiler's target"
#endif

namespace qwen_fused {

// 32 bytes are native to AVX2 and AVX-512VL alike: wider ones are lowered through the stack where they are not
typedef float f32x8 __attribute__((vector_size(32)));
typedef double f64x4 __attribute__((vector_size(32)));
typedef uint32_t u32x8 __attribute__((vector_size(32)));
typedef uint64_t u64x4 __attribute__((vector_size(32)));
typedef uint16_t u16x8 __attribute__((vector_size(16)));

template <class To, class From>
QF_INLINE To bit_cast_to(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

template <class Vector, class T>
QF_INLINE Vector load_as(const T* from) {
  Vector to;
  std::memcpy(&to, from, sizeof(Vector));
  return to;
}

// eight elements as float32, exactly

QF_INLINE f32x8 load8(const float* from) { return load_as<f32x8>(from); }

QF_INLINE f32x8 load8(const c10::BFloat16* from) {
  return bit_cast_to<f32x8>(__builtin_convertvector(load_as<u16x8>(from), u32x8) << 16);
}

QF_INLINE f32x8 load8(const c10::Half* from) {
  const u32x8 half = __builtin_convertvector(load_as<u16x8>(from), u32x8);
  const u32x8 sign = (half & 0x8000u) << 16;
  const u32x8 exponent = half & 0x7c00u;
  const u32x8 rebased = ((half & 0x7fffu) << 13) + ((127u - 15u) << 23);
  // a subnormal half is a normal float: give it an exponent and take the implied leading one off again
  const u32x8 renormalised =
      bit_cast_to<u32x8>(bit_cast_to<f32x8>(rebased + (1u << 23)) - bit_cast_to<float>(113u << 23));
  const u32x8 special = rebased + ((128u - 16u) << 23);
  const u32x8 bits = exponent == 0 ? renormalised : (exponent == 0x7c00u ? special : rebased);
  return bit_cast_to<f32x8>(bits | sign);
}

QF_INLINE u32x8 abs_bits(f32x8 v) { return bit_cast_to<u32x8>(v) & 0x7fffffffu; }
QF_INLINE u64x4 abs_bits(f64x4 v) { return bit_cast_to<u64x4>(v) & 0x7fffffffffffffffull; }

template <class V>
QF_INLINE V max_of(V a, V b) {
  return a > b ? a : b;
}

}  // namespace qwen_fused

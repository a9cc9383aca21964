// Half precision for the host shim, through the compiler's own type.
#pragma once

#include <stdint.h>
#include <string.h>

struct __half {
  uint16_t bits;
};

inline __half __ushort_as_half(uint16_t bits) { return {bits}; }

inline float __half2float(__half half) {
  _Float16 value;
  memcpy(&value, &half, sizeof(value));
  return static_cast<float>(value);
}

inline __half __float2half_rn(float from) {
  const _Float16 value = static_cast<_Float16>(from);
  __half half;
  memcpy(&half, &value, sizeof(half));
  return half;
}

// Vectors of one cell per lane, and the exp and log that the loss needs: float32 by polynomial, float64 by libm.
// No include guard: see efe_tiles.h.

template <class T, int BYTES>
struct Simd {
  static constexpr int LANES = BYTES / sizeof(T);
  using Scalar = T;
  using Int = typename LaneInt<T>::type;
  typedef T V __attribute__((vector_size(BYTES)));
  typedef Int I __attribute__((vector_size(BYTES)));

  static QF_INLINE V load(const T* from) { return load_as<V>(from); }
  static QF_INLINE I load(const Int* from) { return load_as<I>(from); }
  static QF_INLINE void store(T* to, V v) { std::memcpy(to, &v, sizeof(V)); }
  static QF_INLINE V all(T value) { return V{} + value; }

  static QF_INLINE double sum(V v) {
    double total = 0;
    for (int lane = 0; lane < LANES; ++lane) total += v[lane];
    return total;
  }

  static QF_INLINE bool any(I mask) {
    Int found = 0;
    for (int lane = 0; lane < LANES; ++lane) found |= mask[lane];
    return found != 0;
  }

  // x, or low where x is less; a NaN stays. In this order it is one instruction on x86
  static QF_INLINE V at_least(T low, V x) { return all(low) > x ? all(low) : x; }

  // for x <= 0 or NaN, as softmax asks: within 2 ulp, and 0 where the result would be subnormal
  static QF_INLINE V exp(V x) {
    if constexpr (sizeof(T) == 4) {
      // adding 1.5 * 2^23 rounds x / ln 2 to an integer and leaves it in the low bits
      const V shifted = x * 1.44269504088896341f + 12582912.0f;
      const V n = shifted - 12582912.0f;
      // ln 2 in two parts, the first short enough for an exact product
      const V r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
      // Estrin's order: half as deep as Horner's
      const V r2 = r * r;
      const V low = (r * 1.6666665459e-1f + 5.0000001201e-1f) + r2 * (r * 8.3334519073e-3f + 4.1665795894e-2f);
      const V poly = r2 * (low + (r2 * r2) * (r * 1.9875691500e-4f + 1.3981999507e-3f)) + (r + 1.0f);
      const I power = (bit_cast_to<I>(shifted) << 23) + (127 << 23);
      return x < -87.3365448f ? V{} : poly * bit_cast_to<V>(power);
    } else {
      V result{};
      for (int lane = 0; lane < LANES; ++lane) result[lane] = std::exp(x[lane]);
      return result;
    }
  }

  // for positive normal x: within 2 ulp; NaN is not kept
  static QF_INLINE V log(V x) {
    if constexpr (sizeof(T) == 4) {
      // x = 2^e * (1 + f) with 1 + f in [sqrt(1/2), sqrt(2))
      const I bits = bit_cast_to<I>(x);
      const I exponent = (bits - 0x3f3504f3) >> 23;
      const V e = __builtin_convertvector(exponent, V);
      const V f = bit_cast_to<V>(bits - (exponent << 23)) - 1.0f;
      const V f2 = f * f, f4 = f2 * f2;
      const V low = (f * -2.4999993993e-1f + 3.3333331174e-1f) + f2 * (f * -1.6668057665e-1f + 2.0000714765e-1f);
      const V high = (f * -1.2420140846e-1f + 1.4249322787e-1f) + f2 * (f * -1.1514610310e-1f + 1.1676998740e-1f);
      const V poly = low + f4 * (high + f4 * 7.0376836292e-2f);
      const V tail = (poly * f) * f2 + (e * -2.12194440e-4f - f2 * 0.5f);
      return (f + tail) + e * 0.693359375f;
    } else {
      V result{};
      for (int lane = 0; lane < LANES; ++lane) result[lane] = std::log(x[lane]);
      return result;
    }
  }

  // log of a sum of probabilities; where that vanishes it is finite, as it is then multiplied by 0
  static QF_INLINE V log_or_zero(V s) { return log(at_least(std::numeric_limits<T>::min(), s)); }

  static QF_INLINE V times_log(V s) { return s * log_or_zero(s); }
};

// Vectors of one cell per lane, and the exp2 and log2 that the loss needs.
// No include guard, on purpose: level.inc.h includes this once for each instruction set.

inline constexpr double LOG2_E = 1.44269504088896340736;

// 2^f = 1 + f (EXP2[0] + f (EXP2[1] + ...)) for f in [-1/2, 1/2], minimax of the relative error: 9e-8
inline constexpr float EXP2[] = {
    0.6931470036506653f, 0.24022242426872253f, 0.05550733581185341f, 0.009671512991189957f, 0.001326472731307149f};
// the same in float64: 2e-17
inline constexpr double EXP2_64[] = {0.6931471805599453,    0.24022650695910097,   0.0555041086648216,
                                     0.009618129107606888,  0.0013333558146416936, 0.0001540353044173605,
                                     1.525273382983612e-05, 1.321544258792169e-06, 1.0178062445845774e-07,
                                     7.072585949269223e-09, 4.4549605981865186e-10};
// log2(1 + r) = s (LOG2_64[0] + s^2 (LOG2_64[1] + ...)) for s = r / (2 + r) and 1 + r in [sqrt(1/2), sqrt(2)]: 7e-18
inline constexpr double LOG2_64[] = {2.8853900817779268, 0.9617966939259899, 0.5770780163454586, 0.41219858585486296,
                                     0.3205985334227465, 0.2623344335728468, 0.2209109142370262, 0.21368163909696675};
// log2(1 + r) = r (LOG2[0] + r (LOG2[1] + ...)) for |r| <= 0.0304, minimax of the absolute error: 5e-10
inline constexpr float LOG2[] = {
    1.4426950216293335f, -0.7213473916053772f, 0.48123106360435486f, -0.36104145646095276f};
// 1 / the middle of [1 + k / 16, 1 + (k + 1) / 16), and -log2 of it
alignas(64) inline constexpr float MIDDLE[] = {
    0.9696969985961914f, 0.9142857193946838f, 0.8648648858070374f, 0.8205128312110901f,
    0.7804877758026123f, 0.7441860437393188f, 0.7111111283302307f, 0.6808510422706604f,
    0.6530612111091614f, 0.6274510025978088f, 0.6037735939025879f, 0.581818163394928f,
    0.5614035129547119f, 0.5423728823661804f, 0.5245901346206665f, 0.5079365372657776f};
alignas(64) inline constexpr float LOG2_MIDDLE[] = {
    0.044394075870513916f, 0.12928301095962524f, 0.20945332944393158f, 0.28540220856666565f,
    0.35755205154418945f,  0.42626476287841797f, 0.4918530583381653f,  0.5545889139175415f,
    0.6147098541259766f,   0.6724252700805664f,  0.727920413017273f,   0.7813597321510315f,
    0.832889974117279f,    0.8826430439949036f,  0.9307374358177185f,  0.9772798418998718f};

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

template <class T, int BYTES>
struct Simd {
  static constexpr int LANES = BYTES / sizeof(T);
  static constexpr bool FLOAT = sizeof(T) == 4;
  // 2^LEAST and less is 0
  static constexpr T LEAST = FLOAT ? -200 : -1100;
  using Scalar = T;
  using Int = typename LaneInt<T>::type;
  typedef T V __attribute__((vector_size(BYTES)));
  typedef Int I __attribute__((vector_size(BYTES)));
  typedef std::make_unsigned_t<Int> U __attribute__((vector_size(BYTES)));
  typedef uint16_t H __attribute__((vector_size(2 * BYTES / sizeof(T))));

  // some of the lanes; MASKED: loads and stores touch no others
#if QF_LEVEL == 4
  static constexpr bool MASKED = true;
  using Mask = std::conditional_t<FLOAT, __mmask16, __mmask8>;

  static QF_INLINE Mask first(int count) { return static_cast<Mask>((1u << count) - 1); }
  static QF_INLINE Mask differs(I a, Int b) {
    if constexpr (FLOAT)
      return _mm512_cmpneq_epi32_mask((__m512i)a, _mm512_set1_epi32(b));
    else
      return _mm512_cmpneq_epi64_mask((__m512i)a, _mm512_set1_epi64(b));
  }
  static QF_INLINE bool any(Mask mask) { return mask != 0; }
  // whether a lane is larger than limit, or less than -limit
  static QF_INLINE bool any_beyond(V v, T limit) {
    if constexpr (FLOAT)
      return _mm512_cmp_ps_mask(_mm512_abs_ps(v), all(limit), _CMP_GT_OQ) != 0;
    else
      return _mm512_cmp_pd_mask(_mm512_abs_pd(v), all(limit), _CMP_GT_OQ) != 0;
  }
  static QF_INLINE V keep(Mask mask, V v) {
    if constexpr (FLOAT)
      return _mm512_maskz_mov_ps(mask, v);
    else
      return _mm512_maskz_mov_pd(mask, v);
  }
  static QF_INLINE V keep_or_one(Mask mask, V v) {
    if constexpr (FLOAT)
      return _mm512_mask_mov_ps(all(1), mask, v);
    else
      return _mm512_mask_mov_pd(all(1), mask, v);
  }
  static QF_INLINE V load(const T* from, Mask mask) {
    if constexpr (FLOAT)
      return _mm512_maskz_loadu_ps(mask, from);
    else
      return _mm512_maskz_loadu_pd(mask, from);
  }
  static QF_INLINE void store(T* to, V v, Mask mask) {
    if constexpr (FLOAT)
      _mm512_mask_storeu_ps(to, mask, v);
    else
      _mm512_mask_storeu_pd(to, mask, v);
  }
#else
  static constexpr bool MASKED = false;
  using Mask = I;

  static QF_INLINE Mask first(int count) {
    Mask mask{};
    for (int lane = 0; lane < LANES; ++lane) mask[lane] = lane < count ? -1 : 0;
    return mask;
  }
  static QF_INLINE Mask differs(I a, Int b) { return a != b; }
  static QF_INLINE bool any(Mask mask) { return any_of(mask); }
  static QF_INLINE bool any_beyond(V v, T limit) { return any_of((v > limit) | (v < -limit)); }
  static QF_INLINE V keep(Mask mask, V v) { return mask ? v : V{}; }
  static QF_INLINE V keep_or_one(Mask mask, V v) { return mask ? v : all(1); }
  static QF_INLINE V load(const T* from, Mask mask) { return mask ? load(from) : V{}; }
  static QF_INLINE void store(T* to, V v, Mask) { store(to, v); }
#endif

  static QF_INLINE V load(const T* from) { return load_as<V>(from); }
  static QF_INLINE I load(const Int* from) { return load_as<I>(from); }
  static QF_INLINE void store(T* to, V v) { std::memcpy(to, &v, sizeof(V)); }
  static QF_INLINE I labels(int64_t c) { return I{} + static_cast<Int>(c); }
  static QF_INLINE V all(T value) { return V{} + value; }

  static QF_INLINE bool any_of(I found) {
    Int all = 0;
    for (int lane = 0; lane < LANES; ++lane) all |= found[lane];
    return all != 0;
  }

  static QF_INLINE double sum(V v) {
    // four chains, as an addition waits for the one before
    double part[4] = {};
    for (int lane = 0; lane < LANES; ++lane) part[lane % 4] += v[lane];
    return (part[0] + part[1]) + (part[2] + part[3]);
  }

  // x, or low where x is less; a NaN stays
  static QF_INLINE V at_least(T low, V x) {
#if QF_LEVEL == 4
    if constexpr (FLOAT)
      return _mm512_max_ps(all(low), x);
    else
      return _mm512_max_pd(all(low), x);
#else
    return all(low) > x ? all(low) : x;
#endif
  }

  // the larger of the two, b where one is NaN
  static QF_INLINE V larger(V a, V b) {
#if QF_LEVEL == 4
    if constexpr (FLOAT)
      return _mm512_max_ps(a, b);
    else
      return _mm512_max_pd(a, b);
#else
    return a > b ? a : b;
#endif
  }

  // a * b + c, rounded once where the machine can
  static QF_INLINE V fma(V a, V b, V c) {
#if QF_LEVEL == 4
    if constexpr (FLOAT)
      return _mm512_fmadd_ps(a, b, c);
    else
      return _mm512_fmadd_pd(a, b, c);
#elif QF_LEVEL == 3
    if constexpr (FLOAT)
      return _mm256_fmadd_ps(a, b, c);
    else
      return _mm256_fmadd_pd(a, b, c);
#else
    return a * b + c;
#endif
  }

  // what multiplies by log2(e) and subtracts m * log2(e), so that the difference is rounded once whatever m is
  struct Base {
    V shift;
  };
  static QF_INLINE Base base(V m) { return {fused() ? -(m * all(T(LOG2_E))) : -m}; }
  static QF_INLINE V log2_ratio(V x, Base from) {
    return fused() ? fma(x, all(T(LOG2_E)), from.shift) : (x + from.shift) * all(T(LOG2_E));
  }

  // 2^x for x <= 1, -inf or NaN: within 2 ulp, and 0 where the result would be subnormal (of -inf, poly is NaN, and
  // scalef takes it to 0)
  static QF_INLINE V exp2(V x) {
    if constexpr (FLOAT) {
#if QF_LEVEL == 4
      const V n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT);
      const V f = x - n;
#else
      // adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits
      const V shifted = x + 12582912.0f;
      const V f = x - (shifted - 12582912.0f);
#endif
      V poly = fma(all(EXP2[4]), f, all(EXP2[3]));
      poly = fma(poly, f, all(EXP2[2]));
      poly = fma(poly, f, all(EXP2[1]));
      poly = fma(poly, f, all(EXP2[0]));
      poly = fma(poly, f, all(1.0f));
#if QF_LEVEL == 4
      return _mm512_scalef_ps(poly, n);
#else
      // unsigned, as it wraps where x is out of range
      const U power = (bit_cast_to<U>(shifted) << 23) + (127u << 23);
      return x < -126.0f ? V{} : poly * bit_cast_to<V>(power);
#endif
    } else {
#if QF_LEVEL == 4
      const V n = _mm512_roundscale_pd(x, _MM_FROUND_TO_NEAREST_INT);
      const V f = x - n;
#else
      // as above, with 1.5 * 2^52
      const V shifted = x + 6755399441055744.0;
      const V f = x - (shifted - 6755399441055744.0);
#endif
      V poly = all(EXP2_64[10]);
      for (int k = 9; k >= 0; --k) poly = fma(poly, f, all(EXP2_64[k]));
      poly = fma(poly, f, all(1.0));
#if QF_LEVEL == 4
      return _mm512_scalef_pd(poly, n);
#else
      const U power = (bit_cast_to<U>(shifted) << 52) + (uint64_t{1023} << 52);
      return x < -1022.0 ? V{} : poly * bit_cast_to<V>(power);
#endif
    }
  }

  // log2 of a positive normal x or NaN, within 2 ulp of the larger of 1 and the result
  static QF_INLINE V log2(V x) {
    if constexpr (FLOAT) {
#if QF_LEVEL == 4
      // x = 2^e m; 1 / m to four bits from a table
      const V e = _mm512_getexp_ps(x);
      const V m = _mm512_getmant_ps(x, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src);
      const __m512i k = _mm512_srli_epi32(_mm512_castps_si512(x), 19);
      const V r = fma(m, _mm512_permutexvar_ps(k, load(MIDDLE)), all(-1.0f));
      V poly = fma(all(LOG2[3]), r, all(LOG2[2]));
      poly = fma(poly, r, all(LOG2[1]));
      poly = fma(poly, r, all(LOG2[0]));
      return fma(poly, r, _mm512_permutexvar_ps(k, load(LOG2_MIDDLE))) + e;
#else
      // x = 2^e (1 + f) with 1 + f in [sqrt(1/2), sqrt(2))
      const I bits = bit_cast_to<I>(x);
      const I exponent = (bits - 0x3f3504f3) >> 23;
      const V e = __builtin_convertvector(exponent, V);
      const V f = bit_cast_to<V>(bits - (exponent << 23)) - 1.0f;
      const V f2 = f * f, f4 = f2 * f2;
      const V low = (f * -2.4999993993e-1f + 3.3333331174e-1f) + f2 * (f * -1.6668057665e-1f + 2.0000714765e-1f);
      const V high = (f * -1.2420140846e-1f + 1.4249322787e-1f) + f2 * (f * -1.1514610310e-1f + 1.1676998740e-1f);
      const V poly = low + f4 * (high + f4 * 7.0376836292e-2f);
      // the bits of a NaN are lost on the way: x * 0 brings it back
      return (f + ((poly * f) * f2 - f2 * 0.5f)) * T(LOG2_E) + (e + x * 0.0f);
#endif
    } else {
      // x = 2^e (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)); e + 1024 is positive, so that its bits shift in zeros
      const U bits = bit_cast_to<U>(x);
      const U biased = (bits - 0x3fe6a09e667f3bcdull + (uint64_t{1024} << 52)) >> 52;
      // a double of this exponent has the integer in its low bits
      const V e = bit_cast_to<V>(biased | 0x4330000000000000ull) - (4503599627370496.0 + 1024.0);
      const V f = bit_cast_to<V>(bits - ((biased - 1024) << 52)) - 1.0;
      const V s = f / (f + 2.0), s2 = s * s;
      V poly = all(LOG2_64[7]);
      for (int k = 6; k >= 0; --k) poly = fma(poly, s2, all(LOG2_64[k]));
      return fma(poly, s, e + x * 0.0);
    }
  }

 private:
  static constexpr bool fused() {
#if QF_LEVEL >= 3 || defined(__ARM_FEATURE_FMA)
    return true;
#else
    return false;
#endif
  }
};

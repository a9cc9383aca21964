// A vector's width of neighbours in memory, of any dtype, and a square of them turned: rows of classes become vectors
// of cells and back. No include guard, on purpose: level.inc.h includes this once for each instruction set.

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define QF_TURNS 1
#endif
#endif

#ifdef QF_TURNS
inline constexpr bool TURNS = true;

// swaps the off-diagonal blocks of STEP lanes of two rows that are STEP apart
template <class S, int STEP, int... LANE>
QF_INLINE void swap_blocks(typename S::V& a, typename S::V& b, std::integer_sequence<int, LANE...>) {
  const typename S::V low = __builtin_shufflevector(a, b, ((LANE & STEP) ? LANE - STEP + S::LANES : LANE)...);
  b = __builtin_shufflevector(a, b, ((LANE & STEP) ? LANE + S::LANES : LANE + STEP)...);
  a = low;
}

template <class S, int STEP = 1>
QF_INLINE void turn(typename S::V* square) {
  for (int row = 0; row < S::LANES; ++row) {
    if ((row & STEP) == 0) {
      swap_blocks<S, STEP>(square[row], square[row + STEP], std::make_integer_sequence<int, S::LANES>());
    }
  }
  if constexpr (2 * STEP < S::LANES) turn<S, 2 * STEP>(square);
}
#else
inline constexpr bool TURNS = false;

template <class S>
QF_INLINE void turn(typename S::V*) {}
#endif
#undef QF_TURNS

// as many elements as there are lanes, exactly
template <class S, class Stored>
QF_INLINE typename S::V widened(const Stored* from) {
  using T = typename S::Scalar;
  typename S::V to;
#if QF_LEVEL >= 3
  if constexpr (S::FLOAT && std::is_same_v<Stored, c10::Half>) {
#if QF_LEVEL == 4
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#else
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#endif
  }
#endif
  if constexpr (S::FLOAT && std::is_same_v<Stored, c10::BFloat16>) {
    return bit_cast_to<typename S::V>(__builtin_convertvector(load_as<typename S::H>(from), typename S::U) << 16);
  } else if constexpr (std::is_same_v<Stored, T>) {
    return load_as<typename S::V>(from);
  } else {
    for (int l = 0; l < S::LANES; ++l) to[l] = static_cast<T>(from[l]);
    return to;
  }
}

// rounded to the nearest, ties to even, as torch does
template <class S, class Stored>
QF_INLINE void narrow(Stored* to, typename S::V v) {
#if QF_LEVEL >= 3
  if constexpr (S::FLOAT && std::is_same_v<Stored, c10::Half>) {
#if QF_LEVEL == 4
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#else
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#endif
    return;
  }
#endif
  if constexpr (S::FLOAT && std::is_same_v<Stored, c10::BFloat16>) {
    using U = typename S::U;
    const U bits = bit_cast_to<U>(v);
    const U rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const typename S::H half = __builtin_convertvector(v == v ? rounded : U{} + 0x7fc0u, typename S::H);
    std::memcpy(to, &half, sizeof(half));
  } else if constexpr (std::is_same_v<Stored, typename S::Scalar>) {
    S::store(to, v);
  } else {
    for (int l = 0; l < S::LANES; ++l) to[l] = static_cast<Stored>(v[l]);
  }
}

// Softmax over the classes of a vector of cells, in powers and logarithms of two, not yet divided by its sum.
// No include guard: see efe_tiles.cpp.

enum Name { Q, R, P };

// softmax = e * inverse and log2 softmax = z - log_sum, where z = x log2(e) - that of the largest, held at LOG_ZERO or
// above
template <class S>
struct Distribution {
  using V = typename S::V;
  Row<const typename S::Scalar> row{};
  typename S::Base base{};
  V largest{}, sum{}, moment{};  // moment = sum of e z

  QF_INLINE void prefetch(int64_t c) const { __builtin_prefetch(row.x + c * row.stride + AHEAD * S::LANES); }
  QF_INLINE V x(int64_t c, typename S::Mask valid) const { return S::load(row.x + c * row.stride, valid); }
  QF_INLINE V z(int64_t c, typename S::Mask valid) const {
    return S::at_least(typename S::Scalar(LOG_ZERO), S::log2_ratio(x(c, valid), base));
  }
  QF_INLINE V inverse() const { return S::all(1) / sum; }
  QF_INLINE V log_sum() const { return S::log2(sum); }
  // sum of p log2 p
  QF_INLINE V minus_entropy() const { return moment * inverse() - log_sum(); }
};

// one class of a vector of cells on the way; by class, as arrays of 4 KiB each would meet in the same few cache lines
template <class S>
struct Class {
  using V = typename S::V;
  V e[3];  // 2^z of plan, back and preference; backward turns those of plan and back into probabilities
  V log_p, fixed, phi, psi, mass;
};

// fills e[A] and e[B] of each class, and the rest of both distributions from their rows, side by side so that their
// chains of dependent operations overlap; A alone where B is the same. Lanes that are not valid read 0, so that what
// they hold can do no harm; a NaN goes through everything.
template <class S, bool MOMENT, Name A, Name B>
QF_INLINE void softmax(int64_t classes, typename S::Mask valid, Distribution<S>* d, Class<S>* work) {
  using V = typename S::V;
  constexpr bool TWO = A != B;
  Distribution<S>&a = d[A], &b = d[B];
  // locals, as only those are sure to stay in registers
  V largest_a = a.x(0, valid), largest_b = b.x(0, valid);
  for (int64_t c = 0; c < classes; ++c) {
    a.prefetch(c);
    const V xa = a.x(c, valid);
    largest_a = xa > largest_a ? xa : largest_a;
    if constexpr (TWO) {
      b.prefetch(c);
      const V xb = b.x(c, valid);
      largest_b = xb > largest_b ? xb : largest_b;
    }
  }
  a.base = S::base(largest_a);
  if constexpr (TWO) b.base = S::base(largest_b);
  V sum_a{}, sum_b{}, moment_a{}, moment_b{};
  for (int64_t c = 0; c < classes; ++c) {
    const V za = a.z(c, valid), ea = S::exp2(za);
    work[c].e[A] = ea, sum_a += ea;
    if constexpr (MOMENT) moment_a = S::fma(ea, za, moment_a);
    if constexpr (TWO) {
      const V zb = b.z(c, valid), eb = S::exp2(zb);
      work[c].e[B] = eb, sum_b += eb;
      if constexpr (MOMENT) moment_b = S::fma(eb, zb, moment_b);
    }
  }
  if constexpr (TWO) b.largest = largest_b, b.sum = sum_b, b.moment = moment_b;
  a.largest = largest_a, a.sum = sum_a, a.moment = moment_a;
}

// log2 p of the preference into log_p, LOG_ZERO where p is 0 by a logit of -inf; whether there is such a one
template <class S>
QF_INLINE bool log_preference(int64_t classes, typename S::Mask valid, Distribution<S>* d, Class<S>* work) {
  softmax<S, false, P, P>(classes, valid, d, work);
  const typename S::V log_sum = d[P].log_sum();
  typename S::I forbidden{};
  for (int64_t c = 0; c < classes; ++c) {
    const typename S::V z = d[P].z(c, valid);
    const typename S::I zero = z == typename S::Scalar(LOG_ZERO);
    work[c].log_p = zero ? z : z - log_sum;
    forbidden |= zero;
  }
  return S::any_of(forbidden);
}

// lanes in which a live q meets a forbidden p: the risk is infinite there
template <class S>
QF_INLINE typename S::I unbounded(const Class<S>& w) {
  return (w.log_p == typename S::Scalar(LOG_ZERO)) & (w.e[Q] > typename S::V{});
}

// each lane's lowest best class of the plan
template <class S>
QF_INLINE typename S::I argmax(int64_t classes, typename S::Mask valid, const Distribution<S>& q) {
  typename S::I best{};
  for (int64_t c = classes - 1; c >= 0; --c) best = q.x(c, valid) == q.largest ? S::labels(c) : best;
  return best;
}

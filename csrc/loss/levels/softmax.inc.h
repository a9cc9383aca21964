// Softmax over the classes of a block of cells, in powers and logarithms of two, not yet divided by its sum.
// No include guard, on purpose: level.inc.h includes this once for each instruction set.

enum Name { Q, R };

// softmax = e * inverse and log2 softmax = z - log_sum, where z = x log2(e) - that of the largest, held at LEAST or
// above: there e is 0, and what multiplies it must be finite
template <class S>
struct Distribution {
  using V = typename S::V;
  Row<const typename S::Scalar> row{};
  typename S::Base base{};
  V largest{}, sum{}, moment{};  // moment = sum of e z

  QF_INLINE void prefetch(int64_t c, int64_t ahead) const { __builtin_prefetch(row.x + c * row.stride + ahead); }
  QF_INLINE V x(int64_t c, typename S::Mask valid) const { return S::load(row.x + c * row.stride, valid); }
  QF_INLINE V ratio(int64_t c, typename S::Mask valid) const { return S::log2_ratio(x(c, valid), base); }
  QF_INLINE V z(int64_t c, typename S::Mask valid) const { return S::at_least(S::LEAST, ratio(c, valid)); }
  QF_INLINE V inverse() const { return S::all(1) / sum; }
  QF_INLINE V log_sum() const { return S::log2(sum); }
  // sum of p log2 p, but for log_sum
  QF_INLINE V minus_entropy() const { return moment * inverse(); }
};

// one class of a vector of cells on the way; by class, as arrays of 4 KiB each would meet in the same few cache lines
template <class S>
struct Class {
  using V = typename S::V;
  V e[2];      // 2^z of plan and back
  V phi, psi;  // the potentials of both
};

// a vector of cells on the way
template <class S>
struct Vector {
  int64_t i;  // which of the tile's
  typename S::Mask valid;
  Distribution<S> d[2];
  int64_t ahead[2] = {};  // from the rows to those of the next block
  Class<S>* work;
};

// largest logit of each cell; lanes that are not valid read 0, so that what they hold can do no harm
template <class S, Name A>
QF_INLINE void largest(int64_t classes, Vector<S>& v) {
  Distribution<S>& d = v.d[A];
  typename S::V found = d.x(0, v.valid);
  for (int64_t c = 1; c < classes; ++c) found = S::larger(d.x(c, v.valid), found);
  d.largest = found, d.base = S::base(found);
}

// fills e of each class, and the sums, of the plan and where there are TWO of the backward plan; a NaN goes through
// everything. The next block's rows are asked for on the way, as a burst of requests would hold up what is at work;
// where there are moments to sum, those of the backward plan wait for the logarithms
template <class S, bool MOMENT, bool TWO>
QF_INLINE void powers(int64_t classes, Vector<S>& v) {
  using V = typename S::V;
  // locals, as only those are sure to stay in registers
  const Distribution<S> a = v.d[Q], b = TWO ? v.d[R] : Distribution<S>{};
  const auto valid = v.valid;
  const int64_t ahead_a = v.ahead[Q], ahead_b = v.ahead[R];
  Class<S>* const work = v.work;
  V sum_a{}, sum_b{}, moment_a{}, moment_b{};
  for (int64_t c = 0; c < classes; ++c) {
    a.prefetch(c, ahead_a);
    // held at LEAST only where it is multiplied: 2^-inf is 0 as well
    const V za = MOMENT ? a.z(c, valid) : a.ratio(c, valid), ea = S::exp2(za);
    work[c].e[Q] = ea, sum_a += ea;
    if constexpr (MOMENT) moment_a = S::fma(ea, za, moment_a);
    if constexpr (TWO) {
      if constexpr (!MOMENT) b.prefetch(c, ahead_b);
      const V zb = MOMENT ? b.z(c, valid) : b.ratio(c, valid), eb = S::exp2(zb);
      work[c].e[R] = eb, sum_b += eb;
      if constexpr (MOMENT) moment_b = S::fma(eb, zb, moment_b);
    }
  }
  v.d[Q].sum = sum_a, v.d[Q].moment = moment_a;
  if constexpr (TWO) v.d[R].sum = sum_b, v.d[R].moment = moment_b;
}

// vectors taken together, step by step, so that the operations of one fill the waits of another
inline constexpr int64_t BLOCK = 4;

template <class S>
struct Block {
  using T = typename S::Scalar;
  const Tile<S>& tile;
  int64_t size = 0;
  Vector<S> v[BLOCK];
  Class<S> work[BLOCK * MAX_CLASSES];
  alignas(64) T buffer[2][BLOCK * MAX_CLASSES * S::LANES];

  explicit Block(const Tile<S>& tile) : tile(tile) {}

  // calls body() for all the tile's vectors in which a cell counts
  template <class Body>
  QF_INLINE void each(int64_t classes, const Body& body) {
    for (first = 0; first < tile.actives; first += BLOCK) {
      size = std::min(BLOCK, tile.actives - first);
      for (int64_t k = 0; k < size; ++k) {
        v[k].i = tile.active[first + k], v[k].valid = tile.valid[v[k].i], v[k].work = work + k * classes;
      }
      body();
    }
  }

  // cells from the block's to those that are read next, at this step or the one after
  QF_INLINE int64_t ahead(const Strided& x) const {
    const int64_t next = first + BLOCK;
    if (next < tile.actives) return (tile.active[next] - tile.active[first]) * S::LANES;
    return x.stride_t + (tile.active[0] - tile.active[first]) * S::LANES;
  }

  template <Name A>
  QF_INLINE void read(const Strided& x, int64_t t) {
    const int64_t far = ahead(x);
    for (int64_t k = 0; k < size; ++k) {
      v[k].d[A].row = tile.read(x, t, v[k].i, buffer[A] + k * MAX_CLASSES * S::LANES);
      v[k].ahead[A] = far;
      largest<S, A>(x.classes, v[k]);
    }
  }

  template <bool MOMENT, bool TWO>
  QF_INLINE void softmax(int64_t classes) {
    recentre<Q>(classes);
    if constexpr (TWO) recentre<R>(classes);
    for (int64_t k = 0; k < size; ++k) powers<S, MOMENT, TWO>(classes, v[k]);
  }

 private:
  int64_t first = 0;

  // the largest times log2(e) is rounded to no more than 1 / 16, or 2^z would be far from 1 for the largest itself: of
  // larger logits the largest is subtracted first
  template <Name A>
  QF_INLINE void recentre(int64_t classes) {
    for (int64_t k = 0; k < size; ++k) {
      Distribution<S>& d = v[k].d[A];
      if (__builtin_expect(!S::any_beyond(d.largest, T(1 << 20)), 1)) continue;
      T* const to = buffer[A] + k * MAX_CLASSES * S::LANES;
      for (int64_t c = 0; c < classes; ++c) S::store(to + c * S::LANES, d.x(c, v[k].valid) - d.largest);
      d.row = {to, S::LANES}, d.largest = typename S::V{}, d.base = S::base(typename S::V{});
    }
  }
};

// no logarithm of a probability, and finite, as it is multiplied by 0
inline constexpr int FORBIDDEN = 1;

// what a tile keeps of one class of a vector of cells over the steps
template <class S>
struct Kept {
  using V = typename S::V;
  V p, log_p;  // of the preference; in nats, FORBIDDEN where the logit is -inf
  V fixed;     // the part of the plan's potential that is the same at every step
  V mass;      // q summed over the steps
};

// fills p and log_p, and whether a vector has a logit of -inf, or one that is further from the largest than numbers go
template <class S>
QF_INLINE void fill_preference(int64_t classes, const Strided& logits, Block<S>& block, Kept<S>* kept, bool* forbids) {
  using V = typename S::V;
  block.each(classes, [&]() QF_INLINE_LAMBDA {
    block.template read<Q>(logits, 0);
    block.template softmax<false, false>(classes);
    for (int64_t k = 0; k < block.size; ++k) {
      const Vector<S>& v = block.v[k];
      const V log_sum = v.d[Q].log_sum() * S::all(LN_2), inverse = v.d[Q].inverse();
      typename S::I zeros{};
      for (int64_t c = 0; c < classes; ++c) {
        // in nats: the largest numbers times log2(e) would be infinite
        const V x = v.d[Q].x(c, v.valid) - v.d[Q].largest;
        const typename S::I zero = x == -std::numeric_limits<typename S::Scalar>::infinity();
        Kept<S>& own = kept[v.i * classes + c];
        // log_sum - log_sum is 0, or NaN as a NaN of another class makes it
        own.log_p = zero ? S::all(FORBIDDEN) + (log_sum - log_sum) : x - log_sum;
        own.p = v.work[c].e[Q] * inverse;
        zeros |= zero;
      }
      forbids[v.i] = S::any_of(zeros);
    }
  });
}

// lanes in which a live q meets a forbidden p: the risk is infinite there
template <class S>
QF_INLINE typename S::I unbounded(typename S::V log_p, typename S::V q) {
  return (log_p == typename S::Scalar(FORBIDDEN)) & (q > typename S::V{});
}

// each lane's lowest best class of the plan
template <class S>
QF_INLINE typename S::I argmax(int64_t classes, const Vector<S>& v) {
  typename S::I best{};
  for (int64_t c = classes - 1; c >= 0; --c) best = v.d[Q].x(c, v.valid) == v.d[Q].largest ? S::labels(c) : best;
  return best;
}

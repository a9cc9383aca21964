// The forward pass over one tile of cells of one episode: what the tile adds to its episode goes into a slot of its
// own, so that sums do not depend on which thread worked on it. kernels/reference.py has the formulas.
// No include guard, on purpose: level.inc.h includes this once for each instruction set.

// KL(p | exp(anchor)) of each cell, in nats
template <class S>
QF_INLINE typename S::V anchor_divergence(
    int64_t classes, typename S::Mask valid, const Kept<S>* own, Row<const typename S::Scalar> a) {
  using V = typename S::V;
  V cell{};
  for (int64_t c = 0; c < classes; ++c) {
    const V log_ratio = own[c].log_p - S::load(a.x + c * a.stride, valid);
    cell += own[c].p == V{} ? V{} : own[c].p * log_ratio;
  }
  return cell;
}

// sums over the classes: s log2 s for s = q + r, and q log p in nats
template <class S>
struct Sums {
  typename S::V s_log_s{}, cross{};
};

template <class S, bool AGREEMENT_ON, bool RISK_ON>
QF_INLINE Sums<S> sums_of(int64_t classes, const Vector<S>& v, const Kept<S>* own) {
  using V = typename S::V;
  constexpr auto tiny = std::numeric_limits<typename S::Scalar>::min();
  const V iq = v.d[Q].inverse(), ir = AGREEMENT_ON ? v.d[R].inverse() : V{};
  const Class<S>* const work = v.work;
  V s_log_s{}, cross{};
  for (int64_t c = 0; c < classes; ++c) {
    const Class<S>& w = work[c];
    if constexpr (AGREEMENT_ON) {
      v.d[R].prefetch(c, v.ahead[R]);
      // 0 log 0 is moved to where the logarithm is finite
      const V s = S::fma(w.e[R], ir, S::fma(w.e[Q], iq, S::all(tiny)));
      s_log_s = S::fma(s, S::log2(s), s_log_s);
    }
    if constexpr (RISK_ON) cross = S::fma(w.e[Q], own[c].log_p, cross);
  }
  return {s_log_s, cross * iq};
}

template <class S>
QF_INLINE Sums<S> sums_of(const Job<typename S::Scalar>& job, const Vector<S>& v, const Kept<S>* own) {
  if (job.on[AGREEMENT] && job.on[RISK]) return sums_of<S, true, true>(job.classes, v, own);
  if (job.on[AGREEMENT]) return sums_of<S, true, false>(job.classes, v, own);
  if (job.on[RISK]) return sums_of<S, false, true>(job.classes, v, own);
  return {};
}

template <class S>
void forward_tile(const Job<typename S::Scalar>& job, int64_t unit, typename S::Scalar* scratch, double* slot) {
  using T = typename S::Scalar;
  using V = typename S::V;
  using I = typename S::I;
  constexpr int L = S::LANES;
  constexpr T infinity = std::numeric_limits<T>::infinity();
  const int64_t C = job.classes;
  const Tile<S> tile(job, unit);
  std::fill(slot, slot + job.slot_size(), 0.0);
  slot[S_CELLS] = static_cast<double>(tile.labels.valid), slot[S_BAD] = static_cast<double>(tile.labels.bad);
  uint8_t* const predicted = job.predicted + tile.b * job.cells + tile.begin;
  std::fill(predicted, predicted + tile.size, IGNORED_PREDICTION);
  if (tile.actives == 0) return;

  alignas(64) T nll[TILE], mass[MAX_CLASSES * L], other_x[MAX_CLASSES * L];
  Kept<S>* const kept = reinterpret_cast<Kept<S>*>(scratch);
  T* const pooled = scratch + 4 * C * TILE;
  bool forbids[Tile<S>::VECTORS] = {};
  I best[Tile<S>::VECTORS];
  Block<S> block(tile);
  std::fill(nll, nll + TILE, T(0));
  std::fill(mass, mass + C * L, T(0));
  std::fill(pooled, pooled + (job.on[PROMPT] ? job.steps * C * L : 0), T(0));
  V hard_sum{}, kappa_sum{}, ce_sum{}, risk_sum{}, agreement_sum{}, anchor_sum{};
  const bool divergent = job.on[RISK] || job.on[AGREEMENT] || job.on[AMBIGUITY];

  if (job.on[RISK] || job.on[ANCHOR]) fill_preference(C, job.preference, block, kept, forbids);
  for (int64_t k = 0; job.on[ANCHOR] && k < tile.actives; ++k) {
    const int64_t i = tile.active[k];
    const Row<const T> a = tile.read(job.anchor, 0, i, other_x);
    anchor_sum += S::keep(tile.valid[i], anchor_divergence<S>(C, tile.valid[i], kept + i * C, a));
  }

  for (int64_t t = 0; t < job.steps; ++t) {
    const bool last = t == job.steps - 1;
    const T step = static_cast<T>(job.step(t));
    const bool wanted = last || step != 0 || divergent;
    if (!wanted && !job.on[PROMPT]) continue;
    block.each(C, [&]() QF_INLINE_LAMBDA {
      block.template read<Q>(job.plan, t);
      if (job.on[PROMPT]) {
        T* const sum = pooled + t * C * L;
        for (int64_t c = 0; c < C; ++c) {
          V all = S::load(sum + c * L);
          for (int64_t k = 0; k < block.size; ++k) {
            const V x = block.v[k].d[Q].x(c, block.v[k].valid);
            all = S::fma(x == -infinity ? V{} : x, S::all(POOL), all);
          }
          S::store(sum + c * L, all);
        }
      }
      if (!wanted) return;
      if (job.on[AGREEMENT]) {
        block.template read<R>(job.back, t);
        block.template softmax<true, true>(C);
      } else if (job.on[RISK]) {
        block.template softmax<true, false>(C);
      } else {
        block.template softmax<false, false>(C);
      }
      // one logarithm for all sums of a block, whose product is MAX_CLASSES^BLOCK at most
      V product_q = S::all(1), product_r = S::all(1);
      for (int64_t k = 0; k < block.size; ++k) {
        const Vector<S>& v = block.v[k];
        const Kept<S>* const own = kept + v.i * C;
        const Sums<S> sums = sums_of(job, v, own);
        const V negentropy = job.on[RISK] || job.on[AGREEMENT] ? v.d[Q].minus_entropy() : V{};
        product_q *= S::keep_or_one(v.valid, v.d[Q].sum);
        if (job.on[RISK]) {
          V risk = S::fma(negentropy, S::all(LN_2), -sums.cross);
          for (int64_t c = 0; forbids[v.i] && c < C; ++c) {
            risk = unbounded<S>(own[c].log_p, v.work[c].e[Q]) ? S::all(infinity) : risk;
          }
          risk_sum += S::keep(v.valid, risk);
        }
        // twice the divergence, in bits: sum q log q + sum r log r - sum s (log s - log 2), and sum s = 2
        if (job.on[AGREEMENT]) {
          product_r *= S::keep_or_one(v.valid, v.d[R].sum);
          agreement_sum += S::keep(v.valid, negentropy + v.d[R].minus_entropy() - sums.s_log_s + T(2));
        }
        if (job.on[AMBIGUITY]) {
          const V inverse = S::keep(v.valid, v.d[Q].inverse());
          for (int64_t c = 0; c < C; ++c) {
            S::store(mass + c * L, S::fma(v.work[c].e[Q], inverse, S::load(mass + c * L)));
          }
        }
        if (last) best[v.i] = argmax(C, v);
        if (step != 0) {
          const I label = tile.label(v.i);
          V x{};
          if (C > L) {
            // one element after another takes less than a look at every class
            for (int l = 0; l < L; ++l) x[l] = label[l] < 0 ? T(0) : v.d[Q].row.x[label[l] * v.d[Q].row.stride + l];
          } else {
            for (int64_t c = 0; c < C; ++c) x = label == S::labels(c) ? v.d[Q].x(c, v.valid) : x;
          }
          // the distance in nats, as that of large numbers times log2(e) would be infinite; of a class that is all but
          // sure, rounding would make it negative
          const V cell = S::at_least(T(0), S::fma(v.d[Q].log_sum(), S::all(LN_2), v.d[Q].largest - x));
          S::store(nll + v.i * L, S::load(nll + v.i * L) + step * cell);
        }
      }
      const V log_q = S::log2(product_q);
      if (job.on[RISK]) risk_sum = S::fma(log_q, S::all(-LN_2), risk_sum);
      if (job.on[AGREEMENT]) agreement_sum -= log_q + S::log2(product_r);
    });
  }

  for (int64_t k = 0; k < tile.actives; ++k) {
    const int64_t i = tile.active[k];
    const I label = tile.label(i);
    const V kappa = tile.kappa(i);
    const I hard = (label != IGNORED) & (best[i] != label);
    V cost = kappa;
    if (job.hard_mode == HARD_CELL) cost = hard ? kappa : kappa * static_cast<T>(job.hard_floor);
    ce_sum += cost == V{} ? V{} : cost * S::load(nll + i * L);
    kappa_sum += kappa;
    hard_sum += hard ? S::all(1) : V{};
    for (int l = 0; l < tile.count(i); ++l) {
      if (label[l] != IGNORED) predicted[i * L + l] = static_cast<uint8_t>(best[i][l]);
    }
  }

  slot[S_HARD] = S::sum(hard_sum), slot[S_KAPPA] = S::sum(kappa_sum), slot[S_CE] = S::sum(ce_sum);
  slot[S_RISK] = S::sum(risk_sum), slot[S_AGREEMENT] = 0.5 * LN_2 * S::sum(agreement_sum);
  slot[S_ANCHOR] = S::sum(anchor_sum);
  double* tail = slot + S_HEAD;
  for (int64_t c = 0; job.on[AMBIGUITY] && c < C; ++c) *tail++ = S::sum(S::load(mass + c * L));
  for (int64_t k = 0; job.on[PROMPT] && k < job.steps * C; ++k) *tail++ = S::sum(S::load(pooled + k * L)) / POOL;
}

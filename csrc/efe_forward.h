// The forward pass over one tile of cells of one episode: what the tile adds to its episode goes into a slot of its
// own, so that sums do not depend on which thread worked on it. kernels/reference.py has the formulas.
// No include guard: see efe_tiles.cpp.

// KL(p | exp(anchor)) of each cell, in nats
template <class S>
QF_INLINE typename S::V anchor_divergence(
    int64_t classes, typename S::Mask valid, const Distribution<S>& p, const Class<S>* work,
    Row<const typename S::Scalar> a) {
  using V = typename S::V;
  const V inverse = p.inverse();
  V cell{};
  for (int64_t c = 0; c < classes; ++c) {
    const V weight = work[c].e[P] * inverse;
    const V log_ratio = work[c].log_p * S::all(LN_2) - S::load(a.x + c * a.stride, valid);
    cell += weight == V{} ? V{} : weight * log_ratio;
  }
  return cell;
}

// sums over the classes: s log2 s for s = q + r, and q log2 p
template <class S>
struct Sums {
  typename S::V s_log_s{}, cross{};
};

template <class S, bool AGREEMENT_ON, bool RISK_ON>
QF_INLINE Sums<S> sums_of(int64_t classes, const Distribution<S>* d, const Class<S>* work) {
  using V = typename S::V;
  constexpr auto tiny = std::numeric_limits<typename S::Scalar>::min();
  const V iq = d[Q].inverse(), ir = AGREEMENT_ON ? d[R].inverse() : V{};
  V s_log_s{}, cross{};
  for (int64_t c = 0; c < classes; ++c) {
    const Class<S>& w = work[c];
    if constexpr (AGREEMENT_ON) {
      // 0 log 0 is moved to where the logarithm is finite
      const V s = S::fma(w.e[R], ir, S::fma(w.e[Q], iq, S::all(tiny)));
      s_log_s = S::fma(s, S::log2(s), s_log_s);
    }
    if constexpr (RISK_ON) cross = S::fma(w.e[Q], w.log_p, cross);
  }
  return {s_log_s, cross * iq};
}

template <class S>
QF_INLINE Sums<S> sums_of(const Job<typename S::Scalar>& job, const Distribution<S>* d, const Class<S>* work) {
  if (job.on[AGREEMENT] && job.on[RISK]) return sums_of<S, true, true>(job.classes, d, work);
  if (job.on[AGREEMENT]) return sums_of<S, true, false>(job.classes, d, work);
  if (job.on[RISK]) return sums_of<S, false, true>(job.classes, d, work);
  return {};
}

template <class S>
void forward_tile(const Job<typename S::Scalar>& job, int64_t unit, typename S::Scalar* pooled, double* slot) {
  using T = typename S::Scalar;
  using V = typename S::V;
  using I = typename S::I;
  constexpr int L = S::LANES;
  constexpr T infinity = std::numeric_limits<T>::infinity();
  const int64_t b = unit / job.tiles, begin = unit % job.tiles * TILE, C = job.classes;
  const int64_t size = std::min(TILE, job.cells - begin);
  const Labels<S> labels(job, b, begin, size);
  std::fill(slot, slot + job.slot_size(), 0.0);
  slot[S_CELLS] = static_cast<double>(labels.valid), slot[S_BAD] = static_cast<double>(labels.bad);
  uint8_t* const predicted = job.predicted + b * job.cells + begin;
  std::fill(predicted, predicted + size, IGNORED_PREDICTION);
  if (labels.valid == 0) return;

  alignas(64) T plan_x[MAX_CLASSES * L], back_x[MAX_CLASSES * L], other_x[MAX_CLASSES * L];
  Class<S> work[MAX_CLASSES];
  Distribution<S> d[3];
  for (int64_t c = 0; c < C; ++c) work[c].mass = V{};
  std::fill(pooled, pooled + (job.on[PROMPT] ? job.steps * C * L : 0), T(0));
  V hard_sum{}, kappa_sum{}, ce_sum{}, risk_sum{}, agreement_sum{}, anchor_sum{};
  const bool divergent = job.on[RISK] || job.on[AGREEMENT] || job.on[AMBIGUITY];

  for (int64_t i = 0; i < size; i += L) {
    const I label = S::load(labels.label + i);
    const auto valid = S::differs(label, IGNORED);
    if (!S::any(valid)) continue;
    const int count = static_cast<int>(std::min<int64_t>(L, size - i));
    const auto at = [&](const Strided& x, int64_t t, T* buffer) { return read<S>(x, b, t, begin + i, count, buffer); };

    bool forbidden = false;
    if (job.on[RISK] || job.on[ANCHOR]) {
      d[P].row = at(job.preference, 0, other_x);
      forbidden = log_preference(C, valid, d, work) && job.on[RISK];
    }
    if (job.on[ANCHOR]) {
      anchor_sum += S::keep(valid, anchor_divergence(C, valid, d[P], work, at(job.anchor, 0, other_x)));
    }

    // nll in nats, the others in bits; agreement is twice the divergence
    V nll{}, risk{}, agreement{};
    I best{};
    for (int64_t t = 0; t < job.steps; ++t) {
      const bool last = t == job.steps - 1;
      const T step = static_cast<T>(job.step(t));
      const bool wanted = last || step != 0 || divergent;
      if (!wanted && !job.on[PROMPT]) continue;
      d[Q].row = at(job.plan, t, plan_x);
      if (job.on[PROMPT]) {
        T* const sum = pooled + t * C * L;
        for (int64_t c = 0; c < C; ++c) {
          const V x = d[Q].x(c, valid);
          S::store(sum + c * L, S::load(sum + c * L) + (x == -infinity ? V{} : x));
        }
      }
      if (!wanted) continue;
      if (job.on[AGREEMENT]) {
        d[R].row = at(job.back, t, back_x);
        softmax<S, true, Q, R>(C, valid, d, work);
      } else {
        softmax<S, true, Q, Q>(C, valid, d, work);
      }
      const Sums<S> sums = sums_of(job, d, work);
      const V negentropy = d[Q].minus_entropy();
      if (job.on[RISK]) risk += negentropy - sums.cross;
      for (int64_t c = 0; forbidden && c < C; ++c) risk = unbounded(work[c]) ? S::all(infinity) : risk;
      // sum q log q + sum r log r - sum s (log s - log 2), and sum s = 2
      if (job.on[AGREEMENT]) agreement += negentropy + d[R].minus_entropy() - sums.s_log_s + T(2);
      if (job.on[AMBIGUITY]) {
        const V inverse = S::keep(valid, d[Q].inverse());
        for (int64_t c = 0; c < C; ++c) work[c].mass = S::fma(work[c].e[Q], inverse, work[c].mass);
      }
      if (last) best = argmax(C, valid, d[Q]);
      if (step != 0) {
        V x{};
        for (int64_t c = 0; c < C; ++c) x = label == S::labels(c) ? d[Q].x(c, valid) : x;
        nll += step * (d[Q].log_sum() - S::log2_ratio(x, d[Q].base)) * S::all(LN_2);
      }
    }

    const V kappa = S::load(labels.kappa + i);
    const I hard = (label != IGNORED) & (best != label);
    V cost = kappa;
    if (job.hard_mode == HARD_CELL) cost = hard ? kappa : kappa * static_cast<T>(job.hard_floor);
    ce_sum += cost == V{} ? V{} : cost * nll;
    kappa_sum += kappa;
    hard_sum += hard ? S::all(1) : V{};
    risk_sum += S::keep(valid, risk), agreement_sum += S::keep(valid, agreement);
    for (int l = 0; l < count; ++l) {
      if (label[l] != IGNORED) predicted[i + l] = static_cast<uint8_t>(best[l]);
    }
  }

  slot[S_HARD] = S::sum(hard_sum), slot[S_KAPPA] = S::sum(kappa_sum), slot[S_CE] = S::sum(ce_sum);
  slot[S_RISK] = LN_2 * S::sum(risk_sum), slot[S_AGREEMENT] = 0.5 * LN_2 * S::sum(agreement_sum);
  slot[S_ANCHOR] = S::sum(anchor_sum);
  double* tail = slot + S_HEAD;
  for (int64_t c = 0; job.on[AMBIGUITY] && c < C; ++c) *tail++ = S::sum(work[c].mass);
  for (int64_t k = 0; job.on[PROMPT] && k < job.steps * C; ++k) *tail++ = S::sum(S::load(pooled + k * L));
}

// The backward pass over one tile of cells of one episode: dL/dx_c = q_c (phi_c - sum q phi) for the potential phi of
// each term, and k (q - delta) for the cross-entropy.
// No include guard: see efe_tiles.cpp.

// weight of each term in the gradient of a cell
template <class T>
struct Shares {
  T risk, ambiguity, agreement, anchor, kappa;

  Shares(const Job<T>& job, int64_t b) {
    const double per_cell = job.upstream * job.coef[2 * b];
    const auto of = [&](Term term) { return static_cast<T>(job.on[term] ? per_cell * job.weight[term] : 0.0); };
    risk = of(RISK), ambiguity = of(AMBIGUITY), agreement = of(AGREEMENT) / 2, anchor = of(ANCHOR);
    kappa = static_cast<T>(job.upstream * job.coef[2 * b + 1] * job.weight[CE]);
  }
};

// the part of the plan's potential that is the same at every step
template <class S>
QF_INLINE void fixed_potential(
    const Job<typename S::Scalar>& job, const Shares<typename S::Scalar>& share, Class<S>* work) {
  for (int64_t c = 0; c < job.classes; ++c) {
    typename S::V fixed{};
    if (job.on[RISK]) fixed -= S::all(share.risk * LN_2) * work[c].log_p;
    if (job.on[AMBIGUITY]) fixed += share.ambiguity * job.obs_entropy[c];
    work[c].fixed = fixed, work[c].mass = typename S::V{};
  }
}

// sum of q phi, and of r psi
template <class S>
struct Means {
  typename S::V plan, back;
};

// turns e into probabilities and fills the potentials; what is the same for every class drops out of a potential, so
// that z will do for the logarithm
template <class S, bool AGREEMENT_ON>
QF_INLINE Means<S> potentials(
    int64_t classes, const Shares<typename S::Scalar>& share, typename S::Mask valid, const Distribution<S>* d,
    Class<S>* work) {
  using V = typename S::V;
  constexpr auto tiny = std::numeric_limits<typename S::Scalar>::min();
  const V slope = S::all((share.risk + share.agreement) * LN_2), agreement = S::all(share.agreement * LN_2);
  const V iq = d[Q].inverse(), ir = AGREEMENT_ON ? d[R].inverse() : V{};
  V plan{}, back{};
  for (int64_t c = 0; c < classes; ++c) {
    Class<S>& w = work[c];
    const V q = w.e[Q] * iq;
    V phi = S::fma(slope, d[Q].z(c, valid), w.fixed);
    if constexpr (AGREEMENT_ON) {
      const V r = w.e[R] * ir;
      // both may be 0: their logarithm is then multiplied by 0
      const V log_sum = S::log2(q + (r + S::all(tiny)));
      const V psi = agreement * (d[R].z(c, valid) - log_sum);
      phi = S::fma(-agreement, log_sum, phi);
      back = S::fma(r, psi, back);
      w.e[R] = r, w.psi = psi;
    }
    plan = S::fma(q, phi, plan);
    w.e[Q] = q, w.phi = phi;
  }
  return {plan, back};
}

template <class S>
void backward_tile(const Job<typename S::Scalar>& job, int64_t unit) {
  using T = typename S::Scalar;
  using V = typename S::V;
  using I = typename S::I;
  constexpr int L = S::LANES;
  constexpr T infinity = std::numeric_limits<T>::infinity(), nan = std::numeric_limits<T>::quiet_NaN();
  const int64_t b = unit / job.tiles, begin = unit % job.tiles * TILE, C = job.classes;
  const int64_t size = std::min(TILE, job.cells - begin);
  const Labels<S> labels(job, b, begin, size);
  const Shares<T> share(job, b);

  alignas(64) T plan_x[MAX_CLASSES * L], back_x[MAX_CLASSES * L], other_x[MAX_CLASSES * L], out[MAX_CLASSES * L];
  Class<S> work[MAX_CLASSES];
  Distribution<S> d[3];
  const bool d_plan = job.d_plan.there(), d_back = job.d_back.there(), d_preference = job.d_preference.there();
  const bool back = job.on[AGREEMENT] && (d_plan || d_back);

  for (int64_t i = 0; i < size; i += L) {
    const I label = S::load(labels.label + i);
    const auto valid = S::differs(label, IGNORED);
    const int count = static_cast<int>(std::min<int64_t>(L, size - i));
    const auto inside = S::first(count);
    const auto at = [&](const Strided& x, int64_t t, T* buffer) { return read<S>(x, b, t, begin + i, count, buffer); };
    // writes gradient(c) of each class, and 0 where a cell is ignored
    const auto write = [&](const Strided& x, int64_t t, const auto& gradient) QF_INLINE_LAMBDA {
      const auto to = write_at<S>(x, b, t, begin + i, count, out);
      for (int64_t c = 0; c < C; ++c) {
        T* const dx = to.x + c * to.stride;
        __builtin_prefetch(dx + AHEAD * L, 1);
        S::store(dx, S::keep(valid, gradient(c)), inside);
      }
      commit<S>(x, b, t, begin + i, count, out);
    };
    if (!S::any(valid)) {
      const auto zero = [](int64_t) { return V{}; };
      for (int64_t t = 0; t < job.steps; ++t) {
        if (d_plan) write(job.d_plan, t, zero);
        if (d_back) write(job.d_back, t, zero);
      }
      if (d_preference) write(job.d_preference, 0, zero);
      continue;
    }

    bool forbidden = false;
    if (job.on[RISK] || job.on[ANCHOR]) {
      d[P].row = at(job.preference, 0, other_x);
      forbidden = log_preference(C, valid, d, work) && job.on[RISK];
    }
    fixed_potential(job, share, work);
    V cost = S::load(labels.kappa + i) * share.kappa;
    for (int l = 0; job.hard_mode == HARD_CELL && l < count; ++l) {
      if (job.predicted[b * job.cells + begin + i + l] == label[l]) cost[l] *= static_cast<T>(job.hard_floor);
    }

    for (int64_t t = 0; t < job.steps; ++t) {
      d[Q].row = at(job.plan, t, plan_x);
      Means<S> mean;
      if (back) {
        d[R].row = at(job.back, t, back_x);
        softmax<S, false, Q, R>(C, valid, d, work);
        mean = potentials<S, true>(C, share, valid, d, work);
      } else {
        softmax<S, false, Q, Q>(C, valid, d, work);
        mean = potentials<S, false>(C, share, valid, d, work);
      }
      // the gradient of an infinite loss is no number
      for (int64_t c = 0; forbidden && c < C; ++c) work[c].phi = unbounded(work[c]) ? S::all(nan) : work[c].phi;
      for (int64_t c = 0; d_preference && c < C; ++c) work[c].mass += work[c].e[Q];
      if (d_back) {
        write(job.d_back, t, [&](int64_t c) QF_INLINE_LAMBDA { return work[c].e[R] * (work[c].psi - mean.back); });
      }
      if (!d_plan) continue;
      const T step = static_cast<T>(job.step(t));
      const V k = step == 0 ? V{} : cost * step, shift = mean.plan - k;
      const T* const pooled = job.on[PROMPT] ? job.d_pooled + (b * job.steps + t) * C : nullptr;
      write(job.d_plan, t, [&](int64_t c) QF_INLINE_LAMBDA {
        V v = work[c].e[Q] * (work[c].phi - shift);
        if (step != 0) v -= label == S::labels(c) ? k : V{};
        if (pooled != nullptr) v += d[Q].x(c, valid) == -infinity ? V{} : S::all(pooled[c]);
        return v;
      });
    }

    if (!d_preference) continue;
    const V inverse = d[P].inverse();
    V mean{};
    for (int64_t c = 0; c < C; ++c) work[c].e[P] = work[c].e[P] * inverse;
    if (job.on[ANCHOR]) {
      const auto a = at(job.anchor, 0, other_x);
      for (int64_t c = 0; c < C; ++c) {
        Class<S>& w = work[c];
        w.phi = w.e[P] == V{} ? V{} : w.log_p * S::all(LN_2) - S::load(a.x + c * a.stride, valid);
        mean = S::fma(w.e[P], w.phi, mean);
      }
    }
    write(job.d_preference, 0, [&](int64_t c) QF_INLINE_LAMBDA {
      const Class<S>& w = work[c];
      V v{};
      if (job.on[RISK]) v += share.risk * (w.e[P] * static_cast<T>(job.steps) - w.mass);
      if (job.on[ANCHOR]) v += share.anchor * (w.e[P] * (w.phi - mean));
      return v;
    });
  }
}

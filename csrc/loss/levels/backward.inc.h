// The backward pass over one tile of cells of one episode: dL/dx_c = q_c (phi_c - sum q phi) for the potential phi of
// each term, and k (q - delta) for the cross-entropy.
// No include guard, on purpose: level.inc.h includes this once for each instruction set.

// weight of each term in the gradient of a cell
template <class T>
struct Shares {
  T risk, ambiguity, agreement, anchor, kappa;

  Shares(const Job<T>& job, int64_t b) {
    const double per_cell = job.upstream * job.coef[2 * b];
    const auto of = [&](Term term) { return static_cast<T>(job.on[term] ? per_cell * job.weight[term] : 0.0); };
    risk = of(RISK), ambiguity = of(AMBIGUITY), agreement = of(AGREEMENT) / 2, anchor = of(ANCHOR);
    kappa = static_cast<T>(job.on[CE] ? job.upstream * job.coef[2 * b + 1] * job.weight[CE] : 0.0);
  }
};

// 1 / the sum of e, and the sum of q phi, of the plan; the same of back
template <class S>
struct Means {
  typename S::V iq, plan, ir, back;
};

// fills the potentials, and adds q to the mass; what is the same for every class drops out of a potential, so that z
// will do for the logarithm. The rows that the gradients will go to are asked for on the way
template <class S, bool AGREEMENT_ON>
QF_INLINE Means<S> potentials(
    int64_t classes, const Shares<typename S::Scalar>& share, const Vector<S>& v, Kept<S>* own,
    Row<typename S::Scalar> d_plan, Row<typename S::Scalar> d_back) {
  using V = typename S::V;
  constexpr auto tiny = std::numeric_limits<typename S::Scalar>::min();
  const V slope = S::all((share.risk + share.agreement) * LN_2), agreement = S::all(share.agreement * LN_2);
  const V iq = v.d[Q].inverse(), ir = AGREEMENT_ON ? v.d[R].inverse() : V{};
  // locals, as only those are sure to stay in registers
  const Distribution<S> dq = v.d[Q], dr = v.d[R];
  const auto valid = v.valid;
  Class<S>* const work = v.work;
  V plan{}, back{};
  for (int64_t c = 0; c < classes; ++c) {
    Class<S>& w = work[c];
    __builtin_prefetch(d_plan.x + c * d_plan.stride, 1);
    const V q = w.e[Q] * iq;
    V phi = S::fma(slope, dq.z(c, valid), own[c].fixed);
    if constexpr (AGREEMENT_ON) {
      __builtin_prefetch(d_back.x + c * d_back.stride, 1);
      const V r = w.e[R] * ir;
      // both may be 0: their logarithm is then multiplied by 0
      const V log_sum = S::log2(q + (r + S::all(tiny)));
      const V psi = agreement * (dr.z(c, valid) - log_sum);
      phi = S::fma(-agreement, log_sum, phi);
      back = S::fma(r, psi, back);
      w.psi = psi;
    }
    plan = S::fma(q, phi, plan);
    w.phi = phi;
    own[c].mass += q;
  }
  return {iq, plan, ir, back};
}

template <class S>
void backward_tile(const Job<typename S::Scalar>& job, int64_t unit, typename S::Scalar* scratch) {
  using T = typename S::Scalar;
  using V = typename S::V;
  using I = typename S::I;
  constexpr int L = S::LANES;
  constexpr T infinity = std::numeric_limits<T>::infinity(), nan = std::numeric_limits<T>::quiet_NaN();
  const int64_t C = job.classes;
  const Tile<S> tile(job, unit);
  const int64_t b = tile.b;
  const Shares<T> share(job, b);

  Kept<S>* const kept = reinterpret_cast<Kept<S>*>(scratch);
  bool forbids[Tile<S>::VECTORS] = {};
  alignas(64) T cost[TILE], other_x[MAX_CLASSES * L], out[MAX_CLASSES * L];
  Block<S> block(tile);
  const bool d_plan = job.d_plan.there(), d_back = job.d_back.there(), d_preference = job.d_preference.there();
  const bool back = job.on[AGREEMENT] && (d_plan || d_back);
  // whether any term but the cross-entropy and the prompt is there: without them there are no potentials
  const bool divergent = job.on[RISK] || job.on[AMBIGUITY] || job.on[ANCHOR] || back;

  // writes gradient(c) of each class of vector i, and 0 where a cell is ignored
  const auto row = [&](const Strided& x, int64_t t, int64_t i) {
    return write_row<S>(x, b, t, tile.begin + i * L, tile.count(i), out);
  };
  const auto write = [&](const Strided& x, int64_t t, int64_t i, const auto& gradient) QF_INLINE_LAMBDA {
    const int count = tile.count(i);
    const auto inside = S::first(count);
    const Row<T> to = row(x, t, i);
    for (int64_t c = 0; c < C; ++c) S::store(to.x + c * to.stride, S::keep(tile.valid[i], gradient(c)), inside);
    commit<S>(x, b, t, tile.begin + i * L, count, out);
  };
  const auto zero = [](int64_t) { return V{}; };
  for (int64_t i = 0; i < tile.vectors(); ++i) {
    if (S::any(tile.valid[i])) continue;
    for (int64_t t = 0; t < job.steps; ++t) {
      if (d_plan) write(job.d_plan, t, i, zero);
      if (d_back) write(job.d_back, t, i, zero);
    }
    if (d_preference) write(job.d_preference, 0, i, zero);
  }
  if (tile.actives == 0) return;

  if (job.on[RISK] || job.on[ANCHOR]) fill_preference(C, job.preference, block, kept, forbids);
  for (int64_t k = 0; k < tile.actives; ++k) {
    const int64_t i = tile.active[k];
    for (int64_t c = 0; divergent && c < C; ++c) {
      Kept<S>& own = kept[i * C + c];
      own.fixed = V{}, own.mass = V{};
      // held above the least number: where q is 0 its potential must be finite
      if (job.on[RISK]) own.fixed -= S::at_least(std::numeric_limits<T>::lowest(), share.risk * own.log_p);
      if (job.on[AMBIGUITY]) own.fixed += share.ambiguity * job.obs_entropy[c];
    }
    V k_i = tile.kappa(i) * share.kappa;
    const I label = tile.label(i);
    for (int l = 0; job.hard_mode == HARD_CELL && l < tile.count(i); ++l) {
      if (job.predicted[b * job.cells + tile.begin + i * L + l] == label[l]) k_i[l] *= static_cast<T>(job.hard_floor);
    }
    S::store(cost + i * L, k_i);
  }

  for (int64_t t = 0; t < job.steps; ++t) {
    const T step = static_cast<T>(job.step(t));
    const T* const pooled = job.on[PROMPT] ? job.d_pooled + (b * job.steps + t) * C : nullptr;
    block.each(C, [&]() QF_INLINE_LAMBDA {
      block.template read<Q>(job.plan, t);
      if (back) {
        block.template read<R>(job.back, t);
        block.template softmax<false, true>(C);
      } else {
        block.template softmax<false, false>(C);
      }
      Means<S> mean[BLOCK];
      for (int64_t k = 0; k < block.size; ++k) {
        const Vector<S>& v = block.v[k];
        Kept<S>* const own = kept + v.i * C;
        const Row<T> nowhere{out, L}, q = d_plan ? row(job.d_plan, t, v.i) : nowhere;
        const Row<T> r = d_back ? row(job.d_back, t, v.i) : nowhere;
        if (!divergent) {
          mean[k] = {v.d[Q].inverse(), V{}, V{}, V{}};
        } else {
          mean[k] = back ? potentials<S, true>(C, share, v, own, q, r) : potentials<S, false>(C, share, v, own, q, r);
        }
      }
      for (int64_t k = 0; k < block.size; ++k) {
        const Vector<S>& v = block.v[k];
        Class<S>* const work = v.work;
        // where the loss is infinite, so is its gradient, but for the class to blame, or a share of 0: no number
        for (int64_t c = 0; forbids[v.i] && job.on[RISK] && c < C; ++c) {
          const I infinite = unbounded<S>(kept[v.i * C + c].log_p, work[c].e[Q]);
          work[c].phi = infinite ? S::all(nan) : work[c].phi;
          mean[k].plan = infinite ? S::all(share.risk * infinity) : mean[k].plan;
        }
        if (d_back) {
          const V ir = mean[k].ir, shift = mean[k].back * ir;
          write(job.d_back, t, v.i, [&](int64_t c) QF_INLINE_LAMBDA {
            return work[c].e[R] * S::fma(work[c].psi, ir, -shift);
          });
        }
        if (!d_plan) continue;
        const I label = tile.label(v.i);
        const V delta = step == 0 ? V{} : S::load(cost + v.i * L) * step, iq = mean[k].iq,
                shift = (mean[k].plan - delta) * iq;
        write(job.d_plan, t, v.i, [&](int64_t c) QF_INLINE_LAMBDA {
          V d = work[c].e[Q] * (divergent ? S::fma(work[c].phi, iq, -shift) : -shift);
          if (step != 0) d -= label == S::labels(c) ? delta : V{};
          if (pooled != nullptr) d += v.d[Q].x(c, v.valid) == -infinity ? V{} : S::all(pooled[c]);
          return d;
        });
      }
    });
  }

  for (int64_t k = 0; d_preference && k < tile.actives; ++k) {
    const int64_t i = tile.active[k];
    Kept<S>* const own = kept + i * C;
    V mean{};
    if (job.on[ANCHOR]) {
      const Row<const T> a = tile.read(job.anchor, 0, i, other_x);
      for (int64_t c = 0; c < C; ++c) {
        const V log_ratio = own[c].log_p - S::load(a.x + c * a.stride, tile.valid[i]);
        // the potential takes the place of what is no longer needed
        own[c].fixed = own[c].p == V{} ? V{} : log_ratio;
        mean = S::fma(own[c].p, own[c].fixed, mean);
      }
    }
    write(job.d_preference, 0, i, [&](int64_t c) QF_INLINE_LAMBDA {
      V d{};
      if (job.on[RISK]) d += share.risk * (own[c].p * static_cast<T>(job.steps) - own[c].mass);
      if (job.on[ANCHOR]) d += share.anchor * (own[c].p * (own[c].fixed - mean));
      return d;
    });
  }
}

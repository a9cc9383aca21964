// The loss on one tile of cells of one episode, each cell in a lane of its own, classes in a loop; kernels/reference.py
// has the formulas. What a tile adds to its episode goes into a slot of its own, so that sums do not depend on which
// thread worked on it.
//
// No include guard: efe_loss_cpu.cpp includes this once per instruction set, inside a namespace of its own and under
// that set's target pragma. A target attribute on the caller would not do: vector types wider than the baseline's are
// lowered to scalars before anything is inlined.

// stands for log 0 where it is multiplied by 0
inline constexpr float LOG_ZERO = -1e30f;

// logits of one tensor under a vector of cells, and what softmax makes of them
template <class S>
struct Distribution {
  using V = typename S::V;
  const typename S::Scalar* x;
  int64_t stride;
  // log p = z - log_sum, where z is held at LOG_ZERO or above; minus_entropy = sum p log p
  V z[MAX_CLASSES], p[MAX_CLASSES];
  V log_sum, minus_entropy;
};

// softmax of K distributions side by side, so that their chains of dependent operations overlap; ignored lanes read 0,
// so that what they hold can do no harm, and a NaN goes through everything. LOGS: log_sum and minus_entropy too.
// Returns each lane's lowest best class of the first distribution where asked.
template <class S, bool LOGS, class... D>
QF_INLINE typename S::I softmax(int64_t classes, typename S::I valid, bool want_argmax, D&... d) {
  using T = typename S::Scalar;
  using V = typename S::V;
  using I = typename S::I;
  constexpr int K = sizeof...(D);
  Distribution<S>* const all[K] = {&d...};
  V largest[K], sum[K], inverse[K], p_z[K];
  for (int k = 0; k < K; ++k) largest[k] = valid ? S::load(all[k]->x) : V{};
  for (int64_t c = 0; c < classes; ++c) {
    for (int k = 0; k < K; ++k) {
      const T* const x = all[k]->x + c * all[k]->stride;
      const V v = valid ? S::load(x) : V{};
      __builtin_prefetch(x + AHEAD * S::LANES);
      all[k]->z[c] = v;
      largest[k] = v > largest[k] ? v : largest[k];
    }
  }
  I best{};
  if (want_argmax) {
    for (int64_t c = classes - 1; c >= 0; --c) {
      best = all[0]->z[c] == largest[0] ? I{} + static_cast<typename S::Int>(c) : best;
    }
  }
  for (int k = 0; k < K; ++k) sum[k] = V{}, p_z[k] = V{};
  for (int64_t c = 0; c < classes; ++c) {
    for (int k = 0; k < K; ++k) {
      const V z = S::at_least(T(LOG_ZERO), all[k]->z[c] - largest[k]);
      const V e = S::exp(z);
      all[k]->z[c] = z, all[k]->p[c] = e, sum[k] += e;
    }
  }
  for (int k = 0; k < K; ++k) inverse[k] = T(1) / sum[k];
  for (int64_t c = 0; c < classes; ++c) {
    for (int k = 0; k < K; ++k) {
      const V p = all[k]->p[c] * inverse[k];
      all[k]->p[c] = p;
      if constexpr (LOGS) p_z[k] += p * all[k]->z[c];
    }
  }
  for (int k = 0; LOGS && k < K; ++k) {
    // S::log drops NaN; the added term keeps it
    all[k]->log_sum = S::log(sum[k]) + sum[k] * T(0);
    all[k]->minus_entropy = p_z[k] - all[k]->log_sum;
  }
  return best;
}

// log p of a distribution, -inf and all
template <class S>
QF_INLINE typename S::V log_p(const Distribution<S>& d, int64_t c) {
  const typename S::V z = d.z[c] - d.log_sum;
  return d.z[c] == typename S::Scalar(LOG_ZERO) ? S::all(-std::numeric_limits<typename S::Scalar>::infinity()) : z;
}

// p * x with 0 where p is 0, whatever x is; a NaN in p stays
template <class V>
QF_INLINE V times(V p, V x) {
  return p == V{} ? V{} : p * x;
}

template <class S>
void forward_tile(const Job<typename S::Scalar>& job, int64_t unit, typename S::Scalar* scratch, double* slot) {
  using T = typename S::Scalar;
  using V = typename S::V;
  using I = typename S::I;
  constexpr int L = S::LANES;
  const int64_t b = unit / job.tiles, begin = unit % job.tiles * TILE, C = job.classes;
  const int64_t size = std::min(TILE, job.cells - begin);
  const Labels<T> labels(job, b, begin, size);
  std::fill(slot, slot + job.slot_size(), 0.0);
  slot[S_CELLS] = static_cast<double>(labels.valid), slot[S_BAD] = static_cast<double>(labels.bad);
  uint8_t* const predicted = job.predicted + b * job.cells + begin;
  std::fill(predicted, predicted + size, IGNORED_PREDICTION);
  if (labels.valid == 0) return;

  alignas(64) T plan_x[MAX_CLASSES * L], back_x[MAX_CLASSES * L], other_x[MAX_CLASSES * L];
  Distribution<S> q, r, p;
  V mass[MAX_CLASSES], log_p_seen[MAX_CLASSES];
  for (int64_t c = 0; c < C; ++c) mass[c] = V{};
  std::fill(scratch, scratch + (job.on[PROMPT] ? job.steps * C * L : 0), T(0));
  V hard_sum{}, kappa_sum{}, ce_sum{}, risk_sum{}, agreement_sum{}, anchor_sum{};
  const bool preference = job.on[RISK] || job.on[ANCHOR];
  int64_t stride;

  for (int64_t i = 0; i < size; i += L) {
    const I label = S::load(labels.label + i);
    const I valid = label != IGNORED;
    if (!S::any(valid)) continue;
    const int count = static_cast<int>(std::min<int64_t>(L, size - i));

    if (preference) {
      p.x = job.preference.read(b, 0, begin + i, count, L, other_x, p.stride);
      softmax<S, true>(C, valid, false, p);
      for (int64_t c = 0; c < C; ++c) log_p_seen[c] = log_p(p, c);
    }
    if (job.on[ANCHOR]) {
      const T* const a = job.anchor.read(b, 0, begin + i, count, L, other_x, stride);
      V cell{};
      for (int64_t c = 0; c < C; ++c) cell += times(p.p[c], log_p_seen[c] - S::load(a + c * stride));
      anchor_sum += valid ? cell : V{};
    }

    V nll{}, risk{}, agreement{};
    I best{};
    for (int64_t t = 0; t < job.steps; ++t) {
      const bool last = t == job.steps - 1;
      const T step = static_cast<T>(job.step(t));
      const bool divergent = job.on[RISK] || job.on[AGREEMENT] || job.on[AMBIGUITY];
      if (!last && step == 0 && !divergent && !job.on[PROMPT]) continue;
      q.x = job.plan.read(b, t, begin + i, count, L, plan_x, q.stride);
      if (job.on[PROMPT]) {
        T* const pooled = scratch + t * C * L;
        for (int64_t c = 0; c < C; ++c) {
          V v = valid ? S::load(q.x + c * q.stride) : V{};
          v = v == -std::numeric_limits<T>::infinity() ? V{} : v;
          S::store(pooled + c * L, S::load(pooled + c * L) + v);
        }
        if (!last && step == 0 && !divergent) continue;
      }
      I argmax;
      if (job.on[AGREEMENT]) {
        r.x = job.back.read(b, t, begin + i, count, L, back_x, r.stride);
        argmax = softmax<S, true>(C, valid, last, q, r);
      } else {
        argmax = softmax<S, true>(C, valid, last, q);
      }
      if (last) best = argmax;
      if (step != 0) {
        V at_label{};
        for (int64_t c = 0; c < C; ++c) at_label = label == static_cast<typename S::Int>(c) ? log_p(q, c) : at_label;
        nll -= step * at_label;
      }
      if (job.on[RISK]) {
        risk += q.minus_entropy;
        for (int64_t c = 0; c < C; ++c) risk -= times(q.p[c], log_p_seen[c]);
      }
      if (job.on[AMBIGUITY]) {
        for (int64_t c = 0; c < C; ++c) mass[c] += valid ? q.p[c] : V{};
      }
      if (job.on[AGREEMENT]) {
        // twice the divergence: with s = q + r, sum q log q + sum r log r - sum s (log s - log 2), and sum s = 2
        V sum_log{};
        for (int64_t c = 0; c < C; ++c) sum_log += S::times_log(q.p[c] + r.p[c]);
        agreement += q.minus_entropy + r.minus_entropy - sum_log + T(2 * LN_2);
      }
    }

    const V kappa = S::load(labels.kappa + i);
    const I hard = valid & (best != label);
    V cost = kappa;
    if (job.hard_mode == HARD_CELL) cost = hard ? kappa : kappa * static_cast<T>(job.hard_floor);
    ce_sum += times(cost, nll);
    kappa_sum += kappa;
    hard_sum += hard ? V{} + T(1) : V{};
    risk_sum += valid ? risk : V{};
    agreement_sum += valid ? agreement * T(0.5) : V{};
    for (int l = 0; l < count; ++l) {
      if (label[l] != IGNORED) predicted[i + l] = static_cast<uint8_t>(best[l]);
    }
  }

  slot[S_HARD] = S::sum(hard_sum), slot[S_KAPPA] = S::sum(kappa_sum), slot[S_CE] = S::sum(ce_sum);
  slot[S_RISK] = S::sum(risk_sum), slot[S_AGREEMENT] = S::sum(agreement_sum), slot[S_ANCHOR] = S::sum(anchor_sum);
  double* tail = slot + S_HEAD;
  if (job.on[AMBIGUITY]) {
    for (int64_t c = 0; c < C; ++c) *tail++ = S::sum(mass[c]);
  }
  if (job.on[PROMPT]) {
    for (int64_t k = 0; k < job.steps * C; ++k) *tail++ = S::sum(S::load(scratch + k * L));
  }
}

// gradient 0 for a vector of cells that do not count
template <class S>
QF_INLINE void write_zeros(
    const Cells<typename S::Scalar>& d, int64_t b, int64_t steps, int64_t i, int count, int64_t classes,
    typename S::Scalar* out) {
  int64_t stride;
  for (int64_t t = 0; d.there() && t < steps; ++t) {
    typename S::Scalar* const to = d.write_at(b, t, i, count, S::LANES, out, stride);
    for (int64_t c = 0; c < classes; ++c) S::store(to + c * stride, typename S::V{});
    d.commit(b, t, i, count, S::LANES, out);
  }
}

// dL/dx_c = q_c (phi_c - sum q phi) for each potential phi, and k (q - delta) for the cross-entropy
template <class S>
void backward_tile(const Job<typename S::Scalar>& job, int64_t unit) {
  using T = typename S::Scalar;
  using V = typename S::V;
  using I = typename S::I;
  constexpr int L = S::LANES;
  const int64_t b = unit / job.tiles, begin = unit % job.tiles * TILE, C = job.classes;
  const int64_t size = std::min(TILE, job.cells - begin);
  const Labels<T> labels(job, b, begin, size);
  const double per_cell = job.upstream * job.coef[2 * b], per_kappa = job.upstream * job.coef[2 * b + 1];
  const T risk = static_cast<T>(per_cell * job.weight[RISK]),
          ambiguity = static_cast<T>(per_cell * job.weight[AMBIGUITY]);
  const T agreement = static_cast<T>(0.5 * per_cell * job.weight[AGREEMENT]);
  const T anchor = static_cast<T>(per_cell * job.weight[ANCHOR]);
  const T upstream = static_cast<T>(job.upstream);
  const int64_t first = b * job.cells + begin;

  alignas(64) T plan_x[MAX_CLASSES * L], back_x[MAX_CLASSES * L], other_x[MAX_CLASSES * L], out[MAX_CLASSES * L];
  Distribution<S> q, r, p;
  V mass[MAX_CLASSES], log_p_seen[MAX_CLASSES], phi[MAX_CLASSES], psi[MAX_CLASSES];
  const bool preference = job.on[RISK] || job.on[ANCHOR];
  const bool d_plan = job.d_plan.there(), d_back = job.d_back.there(), d_preference = job.d_preference.there();
  const bool back = job.on[AGREEMENT] && (d_plan || d_back);
  int64_t stride, to;

  for (int64_t i = 0; i < size; i += L) {
    const I label = S::load(labels.label + i);
    const I valid = label != IGNORED;
    const int count = static_cast<int>(std::min<int64_t>(L, size - i));
    if (!S::any(valid)) {
      write_zeros<S>(job.d_plan, b, job.steps, begin + i, count, C, out);
      write_zeros<S>(job.d_back, b, job.steps, begin + i, count, C, out);
      write_zeros<S>(job.d_preference, b, 1, begin + i, count, C, out);
      continue;
    }
    if (preference) {
      p.x = job.preference.read(b, 0, begin + i, count, L, other_x, p.stride);
      softmax<S, true>(C, valid, false, p);
      for (int64_t c = 0; c < C; ++c) log_p_seen[c] = log_p(p, c);
    }
    V cost = S::load(labels.kappa + i) * static_cast<T>(per_kappa * job.weight[CE]);
    if (job.hard_mode == HARD_CELL) {
      for (int l = 0; l < count; ++l) {
        if (job.predicted[first + i + l] == label[l]) cost[l] *= static_cast<T>(job.hard_floor);
      }
    }
    for (int64_t c = 0; c < C; ++c) mass[c] = V{};

    for (int64_t t = 0; t < job.steps; ++t) {
      q.x = job.plan.read(b, t, begin + i, count, L, plan_x, q.stride);
      if (back) {
        r.x = job.back.read(b, t, begin + i, count, L, back_x, r.stride);
        softmax<S, false>(C, valid, false, q, r);
      } else {
        softmax<S, false>(C, valid, false, q);
      }
      if (job.on[RISK]) {
        for (int64_t c = 0; c < C; ++c) mass[c] += q.p[c];
      }
      // what is the same for every class drops out of a potential: z will do for log q
      for (int64_t c = 0; c < C; ++c) {
        phi[c] = job.on[RISK] ? (q.p[c] == V{} ? V{} : risk * (q.z[c] - log_p_seen[c])) : V{};
      }
      if (job.on[AMBIGUITY]) {
        for (int64_t c = 0; c < C; ++c) phi[c] += ambiguity * job.obs_entropy[c];
      }
      if (back) {
        V mean{};
        for (int64_t c = 0; c < C; ++c) {
          const V log_sum = S::log_or_zero(q.p[c] + r.p[c]);
          phi[c] += agreement * (q.z[c] - log_sum);
          psi[c] = agreement * (r.z[c] - log_sum);
          mean += r.p[c] * psi[c];
        }
        if (d_back) {
          T* const dy = job.d_back.write_at(b, t, begin + i, count, L, out, to);
          for (int64_t c = 0; c < C; ++c) {
            __builtin_prefetch(dy + c * to + AHEAD * L, 1);
            S::store(dy + c * to, valid ? r.p[c] * (psi[c] - mean) : V{});
          }
          job.d_back.commit(b, t, begin + i, count, L, out);
        }
      }
      if (!d_plan) continue;
      const V k = cost * static_cast<T>(job.step(t));
      V shift = -k;
      for (int64_t c = 0; c < C; ++c) shift += q.p[c] * phi[c];
      const T* const pooled = job.on[PROMPT] ? job.d_pooled + (b * job.steps + t) * C : nullptr;
      T* const dx = job.d_plan.write_at(b, t, begin + i, count, L, out, to);
      for (int64_t c = 0; c < C; ++c) {
        V d = q.p[c] * (phi[c] - shift);
        d -= label == static_cast<typename S::Int>(c) ? k : V{};
        if (pooled != nullptr) {
          const V v = S::load(q.x + c * q.stride);
          d += v == -std::numeric_limits<T>::infinity() ? V{} : V{} + pooled[c] * upstream;
        }
        __builtin_prefetch(dx + c * to + AHEAD * L, 1);
        S::store(dx + c * to, valid ? d : V{});
      }
      job.d_plan.commit(b, t, begin + i, count, L, out);
    }

    if (d_preference) {
      V mean{};
      const T* a = nullptr;
      if (job.on[ANCHOR]) {
        a = job.anchor.read(b, 0, begin + i, count, L, other_x, stride);
        for (int64_t c = 0; c < C; ++c) {
          phi[c] = p.p[c] == V{} ? V{} : log_p_seen[c] - S::load(a + c * stride);
          mean += p.p[c] * phi[c];
        }
      }
      T* const dy = job.d_preference.write_at(b, 0, begin + i, count, L, out, to);
      for (int64_t c = 0; c < C; ++c) {
        V d{};
        if (job.on[RISK]) d += risk * (p.p[c] * static_cast<T>(job.steps) - mass[c]);
        if (a != nullptr) d += anchor * (p.p[c] * (phi[c] - mean));
        S::store(dy + c * to, valid ? d : V{});
      }
      job.d_preference.commit(b, 0, begin + i, count, L, out);
    }
  }
}

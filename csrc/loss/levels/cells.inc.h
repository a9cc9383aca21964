// A tile's cells: their labels, and a vector's width of logits at a time out of tensors of any strides.
// No include guard, on purpose: level.inc.h includes this once for each instruction set.

// logits, or where their gradients go, of a vector of cells
template <class T>
struct Row {
  T* x;
  int64_t stride;  // from class to class
};

// the vector's cells are neighbours of type T: the tensor itself will do
template <class S>
QF_INLINE bool direct(const Strided& x, int count) {
  constexpr Type own = S::FLOAT ? Type::f32 : Type::f64;
  return x.flat && x.stride_w == 1 && x.type == own && (S::MASKED || count == S::LANES);
}

QF_INLINE int64_t cell_offset(const Strided& x, int64_t i) {
  return x.flat ? i * x.stride_w : i / x.width * x.stride_h + i % x.width * x.stride_w;
}

template <class Stored, class S>
void gather(const Strided& x, int64_t offset, int64_t i, int count, typename S::Scalar* to) {
  using T = typename S::Scalar;
  constexpr int L = S::LANES;
  int64_t at[L];
  for (int l = 0; l < L; ++l) at[l] = cell_offset(x, i + std::min(l, count - 1));
  const Stored* const base = static_cast<const Stored*>(x.data) + offset;
  if (count == L && x.flat && x.stride_w == 1) {
    for (int64_t c = 0; c < x.classes; ++c) S::store(to + c * L, widened<S>(base + c * x.stride_c + i));
  } else if (TURNS && x.stride_c == 1 && x.classes < L) {
    // class last: a square in which a row goes on into the next, but that of the last cell
    const int64_t end = at[count - 1] + x.classes;
    typename S::V square[L];
    for (int l = 0; l < L; ++l) {
      Stored row[L] = {};
      const bool inside = at[l] + L <= end;
      if (!inside) std::copy_n(base + at[l], x.classes, row);
      square[l] = widened<S>(inside ? base + at[l] : row);
    }
    turn<S>(square);
    for (int64_t c = 0; c < x.classes; ++c) S::store(to + c * L, square[c]);
  } else if (TURNS && x.stride_c == 1) {
    // a square at a time, the last one over the end of the one before
    for (int64_t c = 0; c < x.classes; c += L) {
      const int64_t first = std::min<int64_t>(c, x.classes - L);
      typename S::V square[L];
      for (int l = 0; l < L; ++l) square[l] = widened<S>(base + at[l] + first);
      turn<S>(square);
      for (int l = 0; l < L; ++l) S::store(to + (first + l) * L, square[l]);
    }
  } else {
    for (int64_t c = 0; c < x.classes; ++c) {
      for (int l = 0; l < L; ++l) to[c * L + l] = static_cast<T>(base[c * x.stride_c + at[l]]);
    }
  }
}

// logits of `count` cells from cell i on, in the tensor itself or brought into `buffer` of [C, lanes]
template <class S>
QF_INLINE Row<const typename S::Scalar> read_row(
    const Strided& x, int64_t b, int64_t t, int64_t i, int count, typename S::Scalar* buffer) {
  using T = typename S::Scalar;
  const int64_t offset = b * x.stride_b + t * x.stride_t;
  if (direct<S>(x, count)) return {static_cast<const T*>(x.data) + offset + i, x.stride_c};
  switch (x.type) {
    case Type::f32: gather<float, S>(x, offset, i, count, buffer); break;
    case Type::f64: gather<double, S>(x, offset, i, count, buffer); break;
    case Type::f16: gather<c10::Half, S>(x, offset, i, count, buffer); break;
    default: gather<c10::BFloat16, S>(x, offset, i, count, buffer); break;
  }
  return {buffer, S::LANES};
}

// where to write the gradient of those cells: as `read_row`; `commit` then brings the buffer home
template <class S>
QF_INLINE Row<typename S::Scalar> write_row(
    const Strided& x, int64_t b, int64_t t, int64_t i, int count, typename S::Scalar* buffer) {
  if (!direct<S>(x, count)) return {buffer, S::LANES};
  return {static_cast<typename S::Scalar*>(x.data) + b * x.stride_b + t * x.stride_t + i, x.stride_c};
}

template <class Stored, class S>
void scatter(const Strided& x, int64_t offset, int64_t i, int count, const typename S::Scalar* from) {
  constexpr int L = S::LANES;
  int64_t at[L];
  for (int l = 0; l < count; ++l) at[l] = cell_offset(x, i + l);
  Stored* const base = static_cast<Stored*>(x.data) + offset;
  if (count == L && x.flat && x.stride_w == 1) {
    for (int64_t c = 0; c < x.classes; ++c) narrow<S>(base + c * x.stride_c + i, S::load(from + c * L));
  } else if (TURNS && x.stride_c == 1 && x.classes < L) {
    typename S::V square[L] = {};
    for (int64_t c = 0; c < x.classes; ++c) square[c] = S::load(from + c * L);
    turn<S>(square);
    for (int l = 0; l < count; ++l) {
      Stored row[L];
      narrow<S>(row, square[l]);
      std::copy_n(row, x.classes, base + at[l]);
    }
  } else if (TURNS && x.stride_c == 1) {
    for (int64_t c = 0; c < x.classes; c += L) {
      const int64_t first = std::min<int64_t>(c, x.classes - L);
      typename S::V square[L];
      for (int l = 0; l < L; ++l) square[l] = S::load(from + (first + l) * L);
      turn<S>(square);
      for (int l = 0; l < count; ++l) narrow<S>(base + at[l] + first, square[l]);
    }
  } else {
    for (int64_t c = 0; c < x.classes; ++c) {
      for (int l = 0; l < count; ++l) base[c * x.stride_c + at[l]] = static_cast<Stored>(from[c * L + l]);
    }
  }
}

template <class S>
QF_INLINE void commit(const Strided& x, int64_t b, int64_t t, int64_t i, int count, const typename S::Scalar* buffer) {
  if (direct<S>(x, count)) return;
  const int64_t offset = b * x.stride_b + t * x.stride_t;
  switch (x.type) {
    case Type::f32: scatter<float, S>(x, offset, i, count, buffer); break;
    case Type::f64: scatter<double, S>(x, offset, i, count, buffer); break;
    case Type::f16: scatter<c10::Half, S>(x, offset, i, count, buffer); break;
    default: scatter<c10::BFloat16, S>(x, offset, i, count, buffer); break;
  }
}

// labels and class weights of a tile, padded with ignored cells to a whole vector
template <class S>
struct Labels {
  using T = typename S::Scalar;
  using Int = typename S::Int;
  alignas(64) Int label[TILE];
  alignas(64) T kappa[TILE];
  int64_t valid = 0, bad = 0;

  Labels(const Job<T>& job, int64_t b, int64_t begin, int64_t size) {
    switch (job.target.type) {
      case Type::u8: read<uint8_t>(job, b, begin, size); break;
      case Type::i8: read<int8_t>(job, b, begin, size); break;
      case Type::i16: read<int16_t>(job, b, begin, size); break;
      case Type::i32: read<int32_t>(job, b, begin, size); break;
      default: read<int64_t>(job, b, begin, size); break;
    }
    for (int64_t i = size; i < std::min(TILE, size + S::LANES); ++i) label[i] = IGNORED, kappa[i] = 0;
  }

 private:
  template <class Stored>
  void read(const Job<T>& job, int64_t b, int64_t begin, int64_t size) {
    const Stored* const from = static_cast<const Stored*>(job.target.data) + b * job.target.stride_b;
    if (job.target.flat) {
      // apart, as the divisions of the other way take longer than everything else here
      for (int64_t i = 0; i < size; ++i) take(job, i, from[(begin + i) * job.target.stride_w]);
    } else {
      for (int64_t i = 0; i < size; ++i) take(job, i, from[cell_offset(job.target, begin + i)]);
    }
  }

  QF_INLINE void take(const Job<T>& job, int64_t i, int64_t o) {
    const bool counts = o != job.ignore_index, in_range = o >= 0 && o < job.classes;
    label[i] = !counts ? IGNORED : in_range ? static_cast<Int>(o) : OUT_OF_RANGE;
    kappa[i] = !counts || !in_range ? T(0) : job.class_weight ? job.class_weight[o] : T(1);
    valid += counts, bad += counts && !in_range;
  }
};

// a tile of one episode, and its vectors of cells
template <class S>
struct Tile {
  using T = typename S::Scalar;
  static constexpr int64_t VECTORS = TILE / S::LANES;
  const int64_t b, begin, size;
  const Labels<S> labels;
  // vectors in which a cell counts, and which of their cells do
  int64_t actives = 0, active[VECTORS];
  typename S::Mask valid[VECTORS];

  Tile(const Job<T>& job, int64_t unit)
      : b(unit / job.tiles),
        begin(unit % job.tiles * TILE),
        size(std::min(TILE, job.cells - begin)),
        labels(job, b, begin, size) {
    for (int64_t v = 0; v < vectors(); ++v) {
      valid[v] = S::differs(label(v), IGNORED);
      if (S::any(valid[v])) active[actives++] = v;
    }
  }

  int64_t vectors() const { return (size + S::LANES - 1) / S::LANES; }
  int count(int64_t v) const { return static_cast<int>(std::min<int64_t>(S::LANES, size - v * S::LANES)); }
  QF_INLINE typename S::I label(int64_t v) const { return S::load(labels.label + v * S::LANES); }
  QF_INLINE typename S::V kappa(int64_t v) const { return S::load(labels.kappa + v * S::LANES); }
  QF_INLINE Row<const T> read(const Strided& x, int64_t t, int64_t v, T* buffer) const {
    return read_row<S>(x, b, t, begin + v * S::LANES, count(v), buffer);
  }
};

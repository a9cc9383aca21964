// Per-group gradient norms on CUDA. Every gradient is read once, a chunk per block, each chunk into its own slot; then
// a block per row adds its slots in a fixed order. No atomics: the same bits at every run.
//
//   slot  = sum of g^2 over the chunk, max |g|, number of NaN and Inf
//   norm  = |inv_scale| * sqrt(sum over the row's slots)
//
// Where elements are alike their roundings are too, and add up: a thread sums a few 16-byte vectors in the gradient's
// arithmetic, float32 or float64, and what comes of that goes into a float64. Where that is not finite, or so small
// that squares may have been lost, the block reads its chunk again, from cache, in float64.
#include <cuda_fp16.h>

#include "multi_tensor.cuh"
#include "reduce.cuh"

namespace qwen_fused::cuda {
namespace {

// sum of squares = sumsq * 4^exponent
struct Slot {
  double sumsq;
  double max_abs;
  int32_t nonfinite;
  int32_t exponent;
  int64_t position;
};

struct F32 {
  using Storage = float;
  using Acc = float;
  static __device__ __forceinline__ float get(float x) { return x; }
};

struct F64 {
  using Storage = double;
  using Acc = double;
  static __device__ __forceinline__ double get(double x) { return x; }
};

struct F16 {
  using Storage = uint16_t;
  using Acc = float;
  static __device__ __forceinline__ float get(uint16_t x) { return __half2float(__ushort_as_half(x)); }
};

struct BF16 {
  using Storage = uint16_t;
  using Acc = float;
  static __device__ __forceinline__ float get(uint16_t x) { return __uint_as_float(static_cast<uint32_t>(x) << 16); }
};

template <class Type>
struct Accumulator {
  double sumsq = 0;
  // a NaN is lost here and shows in sumsq
  typename Type::Acc max_abs = 0;

  // the element's square
  __device__ __forceinline__ typename Type::Acc see(typename Type::Storage x) {
    const typename Type::Acc v = Type::get(x);
    max_abs = larger(max_abs, v < 0 ? -v : v);
    return v * v;
  }

  __device__ __forceinline__ typename Type::Acc see(const uint4& packed) {
    constexpr int N = 16 / sizeof(typename Type::Storage);
    typename Type::Storage items[N];
    memcpy(items, &packed, 16);
    typename Type::Acc sum = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) sum += see(items[i]);
    return sum;
  }
};

template <class Type>
__device__ __forceinline__ Accumulator<Type> read_once(const typename Type::Storage* x, int n) {
  using Storage = typename Type::Storage;
  constexpr int N = 16 / sizeof(Storage);
  constexpr int UNROLL = 4;
  Accumulator<Type> acc;
  const int thread = threadIdx.x;
  // a gradient may be a view that starts anywhere: up to the first 16-byte boundary, and from the last, one element a
  // thread
  const int misaligned = static_cast<int>(reinterpret_cast<uintptr_t>(x) % 16 / sizeof(Storage));
  const int head = min(n, (N - misaligned) % N);
  const int vectors = (n - head) / N;
  const int tail = head + vectors * N;
  if (thread < head) acc.sumsq += acc.see(x[thread]);
  if (tail + thread < n) acc.sumsq += acc.see(x[tail + thread]);

  const uint4* v = reinterpret_cast<const uint4*>(x + head);
  int i = thread;
  for (; i + (UNROLL - 1) * THREADS < vectors; i += UNROLL * THREADS) {
    uint4 packed[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) packed[u] = __ldg(v + i + u * THREADS);
    const typename Type::Acc first = acc.see(packed[0]) + acc.see(packed[1]);
    acc.sumsq += first + (acc.see(packed[2]) + acc.see(packed[3]));
  }
  for (; i < vectors; i += THREADS) acc.sumsq += acc.see(__ldg(v + i));
  return acc;
}

template <class Type>
__device__ __forceinline__ Slot measure_chunk(const typename Type::Storage* x, int n) {
  using Acc = typename Type::Acc;
  __shared__ double sums[WARPS];
  __shared__ Acc maxima[WARPS];
  const Accumulator<Type> acc = read_once<Type>(x, n);
  const double sumsq = block_sum(acc.sumsq, sums);
  const Acc max_abs = block_max(acc.max_abs, maxima);

  // a square under 2^-126 loses bits (2^-1022 in float64); all those of a chunk vanish beside this
  constexpr double TINY = sizeof(Acc) == 8 ? 0x1p-900 : 0x1p-70;
  // and the sum of the slots must fit float64 too; false for Inf and NaN
  constexpr double LARGE = 0x1p900;
  if (sumsq <= LARGE && (sumsq >= TINY || max_abs == 0)) return {sumsq, max_abs, 0, 0, 0};

  // the whole block comes here together: the condition is the same for every thread
  int exponent = 0;
  // squares of float32 and narrower fit float64; those of float64 do once its largest is near one
  if (sizeof(Acc) == 8 && isfinite(max_abs)) exponent = ilogb(max_abs);
  double careful = 0;
  int nonfinite = 0;
  for (int i = threadIdx.x; i < n; i += THREADS) {
    const double v = Type::get(x[i]);
    nonfinite += !isfinite(v);
    const double scaled = sizeof(Acc) == 8 ? ldexp(v, -exponent) : v;
    careful += scaled * scaled;
  }
  __shared__ double careful_sums[WARPS];
  __shared__ int bad_sums[WARPS];
  careful = block_sum(careful, careful_sums);
  nonfinite = block_sum(nonfinite, bad_sums);
  // with a NaN the sum is NaN, with an Inf alone it is Inf: just what is to be told of the largest
  return {careful, nonfinite > 0 ? careful : static_cast<double>(max_abs), nonfinite, exponent, 0};
}

__global__ void __launch_bounds__(THREADS, 6) measure_kernel(const __grid_constant__ Batch batch, Slot* slots) {
  const Chunk chunk = find_chunk(batch, blockIdx.x);
  const char* data = static_cast<const char*>(batch.data[chunk.tensor]);
  Slot slot;
  switch (static_cast<Kind>(batch.tag[chunk.tensor] >> TAG_BITS)) {
    case Kind::f32: slot = measure_chunk<F32>(reinterpret_cast<const float*>(data) + chunk.begin, chunk.size); break;
    case Kind::f64: slot = measure_chunk<F64>(reinterpret_cast<const double*>(data) + chunk.begin, chunk.size); break;
    case Kind::f16: slot = measure_chunk<F16>(reinterpret_cast<const uint16_t*>(data) + chunk.begin, chunk.size); break;
    default: slot = measure_chunk<BF16>(reinterpret_cast<const uint16_t*>(data) + chunk.begin, chunk.size); break;
  }
  slot.position = batch.tag[chunk.tensor] & TAG_MASK;
  if (threadIdx.x == 0) slots[blockIdx.x] = slot;
}

// rows by their slots
constexpr int MAX_ROWS = CUDART_VERSION >= 12010 ? 1300 : 160;
struct RowBatch {
  int64_t begin[MAX_ROWS];
  int64_t end[MAX_ROWS];
  int64_t base[MAX_ROWS];
  int64_t first_row;
};
static_assert(sizeof(RowBatch) <= MAX_ARGUMENT, "see Batch");

// beyond every exponent of a float64
constexpr int NO_EXPONENT = 1 << 20;

struct NanOrLarger {
  __device__ __forceinline__ double operator()(double a, double b) const { return (isnan(a) || a > b) ? a : b; }
};

struct First {
  __device__ __forceinline__ int64_t operator()(int64_t a, int64_t b) const { return a < b ? a : b; }
};

// one block adds all slots of a row: a large model has tens of thousands
constexpr int FINISH_THREADS = 512;
constexpr int FINISH_WARPS = FINISH_THREADS / 32;

__global__ void __launch_bounds__(FINISH_THREADS, 1) finish_kernel(
    const __grid_constant__ RowBatch rows, const Slot* slots, InvScale inv_scale, void* values, bool values_double,
    int64_t* counts, int64_t row_count) {
  __shared__ double shared_sum[FINISH_WARPS];
  __shared__ int shared_largest[FINISH_WARPS];
  __shared__ int shared_smallest[FINISH_WARPS];
  __shared__ double shared_shifted[FINISH_WARPS];
  __shared__ double shared_max[FINISH_WARPS];
  __shared__ int64_t shared_bad[FINISH_WARPS];
  __shared__ int64_t shared_first[FINISH_WARPS];
  const int thread = threadIdx.x;
  const int64_t begin = rows.begin[blockIdx.x];
  const int64_t end = rows.end[blockIdx.x];

  double sum = 0;
  double max_abs = 0;
  int64_t nonfinite = 0;
  int64_t first = INT64_MAX;
  // of the slots that hold anything; kept negated where the smallest is wanted
  int largest = -NO_EXPONENT;
  int smallest = -NO_EXPONENT;
#pragma unroll 4
  for (int64_t i = begin + thread; i < end; i += FINISH_THREADS) {
    const Slot slot = slots[i];
    sum += slot.sumsq;
    if (slot.sumsq != 0) {
      largest = larger(largest, slot.exponent);
      smallest = larger(smallest, -slot.exponent);
    }
    max_abs = NanOrLarger()(slot.max_abs, max_abs);
    nonfinite += slot.nonfinite;
    if (slot.nonfinite > 0 && slot.position < first) first = slot.position;
  }
  max_abs = block_reduce(max_abs, shared_max, NanOrLarger());
  nonfinite = block_sum(nonfinite, shared_bad);
  first = block_reduce(first, shared_first, First());
  sum = block_sum(sum, shared_sum);
  largest = block_max(largest, shared_largest);
  smallest = -block_max(smallest, shared_smallest);
  if (largest == -NO_EXPONENT) {
    largest = 0;
  } else if (largest != 0 || smallest != 0) {
    // rare, and the same for the whole block: float64 gradients near the ends of their range
    double shifted = 0;
    for (int64_t i = begin + thread; i < end; i += FINISH_THREADS) {
      if (slots[i].sumsq != 0) shifted += ldexp(slots[i].sumsq, 2 * (slots[i].exponent - largest));
    }
    sum = block_sum(shifted, shared_shifted);
  }
  if (thread != 0) return;

  double scale = inv_scale.value;
  if (inv_scale.scalar != nullptr) {
    scale *= inv_scale.scalar_is_double ? *static_cast<const double*>(inv_scale.scalar)
                                        : *static_cast<const float*>(inv_scale.scalar);
  }
  const int64_t r = rows.first_row + blockIdx.x;
  const double norm = ldexp(sqrt(sum) * fabs(scale), largest);
  if (values_double) {
    double* const out = static_cast<double*>(values);
    out[r] = norm;
    out[row_count + r] = max_abs * fabs(scale);
    out[2 * row_count + r] = scale;
  } else {
    float* const out = static_cast<float*>(values);
    out[r] = static_cast<float>(norm);
    out[row_count + r] = static_cast<float>(max_abs * fabs(scale));
    out[2 * row_count + r] = static_cast<float>(scale);
  }
  counts[r] = nonfinite;
  counts[row_count + r] = first == INT64_MAX ? -1 : first - rows.base[blockIdx.x];
}

}  // namespace

size_t grad_norm_workspace(const Gradient* grads, int64_t count) {
  size_t slots = 1;
  for (int64_t i = 0; i < count; ++i) slots += chunks_of(grads[i]);
  return slots * sizeof(Slot);
}

cudaError_t grad_norm(
    const Gradient* grads, int64_t count, const Row* rows, int64_t row_count, InvScale inv_scale, void* workspace,
    void* values, bool values_double, int64_t* counts, cudaStream_t stream) {
  Slot* const slots = static_cast<Slot*>(workspace);
  cudaError_t error = for_each_batch(
      grads, count, [&](int64_t i) { return static_cast<uint32_t>(grads[i].position); }, [](int64_t) { return 0.0f; },
      [&](const Batch& batch, unsigned blocks, int64_t first_slot) {
        return launch(measure_kernel, blocks, THREADS, stream, batch, slots + first_slot);
      });
  if (error != cudaSuccess) return error;

  std::vector<int64_t> first_slot(count + 1, 0);
  for (int64_t i = 0; i < count; ++i) first_slot[i + 1] = first_slot[i] + chunks_of(grads[i]);
  for (int64_t begin = 0; begin < row_count; begin += MAX_ROWS) {
    RowBatch batch;
    batch.first_row = begin;
    const int64_t size = std::min<int64_t>(MAX_ROWS, row_count - begin);
    for (int64_t r = 0; r < size; ++r) {
      batch.begin[r] = first_slot[rows[begin + r].begin];
      batch.end[r] = first_slot[rows[begin + r].end];
      batch.base[r] = rows[begin + r].base;
    }
    error = launch(
        finish_kernel, static_cast<unsigned>(size), FINISH_THREADS, stream, batch, slots, inv_scale, values,
        values_double, counts, row_count);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace qwen_fused::cuda

// Runs the kernels on a case from a file: measure, then clip where bounds are given; writes what came out.
//
// in:  int64 count, rows, clip rows, kind of scalar (0 none, 1 float, 2 double), values are double, bounds are on the device;
//      double inv_scale, scalar
//      per gradient: int64 kind, numel, offset in bytes, position; its bytes      per row: int64 begin, end, base
//      per clip row: double bound
// out: double values [3, rows]; int64 counts [2, rows]; the bytes of every gradient after the clip
#include <cuda_runtime.h>

#include <cstdio>

#include "grad_norm_cuda.h"

using namespace qwen_fused::cuda;

template <class T>
T read(FILE* file) {
  T value;
  if (fread(&value, sizeof(T), 1, file) != 1) abort();
  return value;
}

int main(int, char** names) {
  FILE* in = fopen(names[1], "rb");
  const int64_t count = read<int64_t>(in), R = read<int64_t>(in), clip_rows = read<int64_t>(in);
  const int64_t scalar_kind = read<int64_t>(in), values_double = read<int64_t>(in), on_device = read<int64_t>(in);
  const double inv_scale = read<double>(in), scalar = read<double>(in);
  // on the heap, and no byte larger than needed: a step outside is seen
  const std::unique_ptr<float> scalar_float(new float(static_cast<float>(scalar)));
  const std::unique_ptr<double> scalar_double(new double(scalar));

  std::vector<std::unique_ptr<char[]>> memory;
  std::vector<Gradient> grads;
  std::vector<size_t> bytes;
  for (int64_t i = 0; i < count; ++i) {
    const Kind kind = static_cast<Kind>(read<int64_t>(in));
    const int64_t numel = read<int64_t>(in), offset = read<int64_t>(in), position = read<int64_t>(in);
    const size_t item = kind == Kind::f64 ? 8 : kind == Kind::f32 ? 4 : 2;
    bytes.push_back(numel * item);
    memory.emplace_back(new char[offset + bytes.back()]);
    char* const data = memory.back().get() + offset;
    if (fread(data, 1, bytes.back(), in) != bytes.back()) abort();
    grads.push_back({data, numel, kind, static_cast<int32_t>(position)});
  }
  std::vector<Row> rows;
  for (int64_t r = 0; r < R; ++r) {
    const int64_t begin = read<int64_t>(in), end = read<int64_t>(in);
    rows.push_back({begin, end, read<int64_t>(in)});
  }
  std::vector<double> bounds;
  for (int64_t r = 0; r < clip_rows; ++r) bounds.push_back(read<double>(in));
  fclose(in);

  const size_t size = grad_norm_workspace(grads.data(), count);
  const std::unique_ptr<char[]> workspace(new char[size]);
  const size_t width = values_double ? 8 : 4;
  const std::unique_ptr<char[]> values(new char[3 * R * width]);
  const std::unique_ptr<int64_t[]> counts(new int64_t[2 * R]);
  // poison: what is not written shows
  memset(workspace.get(), 0xff, size);
  memset(values.get(), 0xff, 3 * R * width);
  memset(counts.get(), 0x7f, 2 * R * sizeof(int64_t));
  const void* const scalars[] = {nullptr, scalar_float.get(), scalar_double.get()};
  const InvScale scale = {inv_scale, scalars[scalar_kind], scalar_kind == 2};
  cudaError_t error = grad_norm(
      grads.data(), count, rows.data(), R, scale, workspace.get(), values.get(), values_double, counts.get(), nullptr);
  if (error == cudaSuccess && clip_rows > 0) {
    error = grad_clip(
        grads.data(), count, rows.data(), clip_rows, on_device ? nullptr : bounds.data(),
        on_device ? bounds.data() : nullptr, values.get(), values_double, R, nullptr);
  }
  if (error != cudaSuccess) return 3;

  FILE* out = fopen(names[2], "wb");
  for (int64_t i = 0; i < 3 * R; ++i) {
    const double value = values_double ? reinterpret_cast<double*>(values.get())[i]
                                       : reinterpret_cast<float*>(values.get())[i];
    fwrite(&value, sizeof(value), 1, out);
  }
  fwrite(counts.get(), sizeof(int64_t), 2 * R, out);
  for (int64_t i = 0; i < count; ++i) fwrite(grads[i].data, 1, bytes[i], out);
  fclose(out);
  return 0;
}

// Cells of a [B, T, C, H, W] tensor of any strides and dtype, a vector's width of them at a time.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace qwen_fused {

// largest number of cells in a vector: float32 in 64 bytes
inline constexpr int MAX_LANES = 16;

template <class T>
class Cells {
 public:
  Cells() = default;

  // axes b and t may be absent: their stride is then 0
  Cells(const at::Tensor& x, bool has_b, bool has_t) : data_(x.data_ptr()), type_(x.scalar_type()) {
    const int64_t d = x.dim();
    stride_b_ = has_b ? x.stride(0) : 0;
    stride_t_ = has_t ? x.stride(d - 4) : 0;
    stride_c_ = x.stride(d - 3), stride_h_ = x.stride(d - 2), stride_w_ = x.stride(d - 1);
    const int64_t H = x.size(d - 2);
    classes_ = x.size(d - 3), width_ = x.size(d - 1);
    // one axis of cells where the canvas allows it
    if (width_ == 1) {
      stride_w_ = stride_h_, flat_ = true;
    } else {
      flat_ = H == 1 || stride_h_ == stride_w_ * width_;
    }
    direct_ = flat_ && stride_w_ == 1 && type_ == c10::CppTypeToScalarType<T>::value;
  }

  bool there() const { return data_ != nullptr; }

  // logits of `count` cells from cell i on: a pointer and the stride of a class, into the tensor itself where its cells
  // are neighbours of type T, else into `buffer` of [C, lanes]
  const T* read(int64_t b, int64_t t, int64_t i, int count, int lanes, T* buffer, int64_t& stride_c) const {
    const int64_t offset = b * stride_b_ + t * stride_t_;
    if (direct_ && count == lanes) {
      stride_c = stride_c_;
      return static_cast<const T*>(data_) + offset + i;
    }
    stride_c = lanes;
    switch (type_) {
      case at::kFloat: gather<float>(offset, i, count, lanes, buffer); break;
      case at::kDouble: gather<double>(offset, i, count, lanes, buffer); break;
      case at::kHalf: gather<c10::Half>(offset, i, count, lanes, buffer); break;
      default: gather<c10::BFloat16>(offset, i, count, lanes, buffer); break;
    }
    return buffer;
  }

  // where to write the gradient of those cells: as `read`; `commit` then brings the buffer home
  T* write_at(int64_t b, int64_t t, int64_t i, int count, int lanes, T* buffer, int64_t& stride_c) const {
    if (direct_ && count == lanes) {
      stride_c = stride_c_;
      return static_cast<T*>(data_) + b * stride_b_ + t * stride_t_ + i;
    }
    stride_c = lanes;
    return buffer;
  }

  void commit(int64_t b, int64_t t, int64_t i, int count, int lanes, const T* buffer) const {
    if (direct_ && count == lanes) return;
    const int64_t offset = b * stride_b_ + t * stride_t_;
    switch (type_) {
      case at::kFloat: scatter<float>(offset, i, count, lanes, buffer); break;
      case at::kDouble: scatter<double>(offset, i, count, lanes, buffer); break;
      case at::kHalf: scatter<c10::Half>(offset, i, count, lanes, buffer); break;
      default: scatter<c10::BFloat16>(offset, i, count, lanes, buffer); break;
    }
  }

 private:
  void offsets(int64_t i, int count, int64_t* at) const {
    for (int l = 0; l < count; ++l) {
      at[l] = flat_ ? (i + l) * stride_w_ : (i + l) / width_ * stride_h_ + (i + l) % width_ * stride_w_;
    }
  }

  template <class S>
  void gather(int64_t offset, int64_t i, int count, int lanes, T* buffer) const {
    int64_t at[MAX_LANES];
    offsets(i, count, at);
    const S* const base = static_cast<const S*>(data_) + offset;
    const bool neighbours = flat_ && stride_w_ == 1;
    for (int64_t c = 0; c < classes_; ++c) {
      const S* const row = base + c * stride_c_;
      T* const to = buffer + c * lanes;
      if (neighbours) {
        for (int l = 0; l < count; ++l) to[l] = static_cast<T>(row[i + l]);
      } else {
        for (int l = 0; l < count; ++l) to[l] = static_cast<T>(row[at[l]]);
      }
      for (int l = count; l < lanes; ++l) to[l] = 0;
    }
  }

  template <class S>
  void scatter(int64_t offset, int64_t i, int count, int lanes, const T* buffer) const {
    int64_t at[MAX_LANES];
    offsets(i, count, at);
    S* const base = static_cast<S*>(data_) + offset;
    for (int64_t c = 0; c < classes_; ++c) {
      S* const row = base + c * stride_c_;
      const T* const from = buffer + c * lanes;
      for (int l = 0; l < count; ++l) row[at[l]] = static_cast<S>(from[l]);
    }
  }

  void* data_ = nullptr;
  at::ScalarType type_ = at::kFloat;
  int64_t stride_b_ = 0, stride_t_ = 0, stride_c_ = 0, stride_h_ = 0, stride_w_ = 0;
  int64_t classes_ = 0, width_ = 1;
  bool flat_ = true, direct_ = false;
};

}  // namespace qwen_fused

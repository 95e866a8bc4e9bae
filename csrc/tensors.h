// The few tensor operations the extension needs, over LibTorch's stable C shims: they call the CPU kernels
// without a dispatcher.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <vector>

#include "describe.h"

namespace mole {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

inline int32_t shim_dtype(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return aoti_torch_dtype_float32();
    case ScalarType::Double:
      return aoti_torch_dtype_float64();
    case ScalarType::BFloat16:
      return aoti_torch_dtype_bfloat16();
    default:
      return aoti_torch_dtype_float16();
  }
}

// an uninitialised contiguous CPU tensor
inline Tensor empty(std::initializer_list<int64_t> sizes, ScalarType type) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (int64_t i = int64_t(sizes.size()) - 2; i >= 0; --i) strides[i] = strides[i + 1] * sizes.begin()[i + 1];
  AtenTensorHandle out;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.begin(), strides.data(),
                                                         shim_dtype(type), aoti_torch_device_type_cpu(), 0,
                                                         &out));
  return Tensor(out);
}

// a matrix [rows,cols] in t's storage, beginning `offset` elements after t does
inline Tensor matrix(
    const Tensor& t, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride, int64_t offset = 0) {
  const int64_t sizes[2] = {rows, cols}, strides[2] = {row_stride, col_stride};
  AtenTensorHandle out;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(t.get(), 2, sizes, strides, offset, &out));
  return Tensor(out);
}

// out = bias + a · b, or a · b
inline void product(const Tensor& out, const Maybe& bias, const Tensor& a, const Tensor& b) {
  const AOTITorchError failed = bias
                                    ? aoti_torch_cpu_addmm_out(out.get(), bias->get(), a.get(), b.get(), 1, 1)
                                    : aoti_torch_cpu_mm_out(out.get(), a.get(), b.get());
  STABLE_TORCH_ERROR_CODE_CHECK(failed);
}

inline Tensor as(const Tensor& t, ScalarType type) {
  return t.scalar_type() == type ? t : torch::stable::to(t, type);
}
inline Maybe as(const Maybe& t, ScalarType type) { return t ? Maybe(as(*t, type)) : t; }
inline Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }
inline Maybe dense(const Maybe& t) { return t ? Maybe(dense(*t)) : t; }

inline void* data(const Tensor& t) { return t.data_ptr(); }
inline void* data(const Maybe& t) { return t ? t->data_ptr() : nullptr; }

}  // namespace mole

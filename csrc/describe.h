// Tensors in the words of an error message: "[48,64] float32 on cpu".
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <string>

namespace mole {

template <class Sizes>
std::string shape_text(const Sizes& sizes) {
  std::string text = "[";
  for (int64_t n : sizes) text += (text.size() > 1 ? "," : "") + std::to_string(n);
  return text + "]";
}

inline std::string shape_of(const torch::stable::Tensor& t) { return shape_text(t.sizes()); }

inline std::string dtype_text(torch::headeronly::ScalarType type) {
  using torch::headeronly::ScalarType;
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Int:
      return "int32";
    default:
      return "dtype " + std::to_string(int(type));
  }
}

inline std::string device_text(const torch::stable::Tensor& t) {
  return t.is_cpu() ? "cpu" : t.is_cuda() ? "cuda:" + std::to_string(t.get_device()) : "another device";
}

inline std::string describe(const torch::stable::Tensor& t) {
  return shape_of(t) + " " + dtype_text(t.scalar_type()) + " on " + device_text(t);
}

}  // namespace mole

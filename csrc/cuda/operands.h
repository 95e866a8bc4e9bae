// What the operators of sm90.cpp and sm90_backward.cpp share: checks that name a tensor and its shape,
// operands as TMA sees them, sizes.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../describe.h"
#include "sm90/launch.h"

// weak: with a torch that has no CUDA the library still loads, and this is null
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device,
                                                                                   void** stream);

namespace mole::sm90 {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

inline void expect(const Tensor& t, const char* name, std::initializer_list<int64_t> sizes, int device) {
  bool good = t.dim() == int64_t(sizes.size());
  for (int64_t i = 0; good && i < t.dim(); ++i) good = t.size(i) == sizes.begin()[i];
  STD_TORCH_CHECK(good && t.is_cuda() && t.get_device() == device, "mole_cuda: expected ", name, " ",
                  shape_text(sizes), " on cuda:", device, ", where x is, got ", describe(t));
}

inline void expect_type(const Tensor& t, const char* name, ScalarType type) {
  STD_TORCH_CHECK(t.scalar_type() == type, "mole_cuda: expected ", name, " in ", dtype_text(type), ", got ",
                  describe(t));
}

// room for `count` elements that the kernel may use as it likes
inline void* workspace(const Maybe& t, const char* name, ScalarType type, int64_t count, int device) {
  if (count == 0) return nullptr;
  STD_TORCH_CHECK(t && t->is_cuda() && t->get_device() == device && t->scalar_type() == type &&
                      t->is_contiguous() && t->numel() >= count,
                  "mole_cuda: expected workspace ", name, " of ", count,
                  " contiguous elements on CUDA device ", device);
  return t->data_ptr();
}

inline Way way_of(const std::string& name) {
  for (Way way : {Way::cluster, Way::persistent, Way::recompute})
    if (name == name_of(way)) return way;
  STD_TORCH_CHECK(false, "mole_cuda: expected way cluster, persistent or recompute, got ", name);
  return Way::cluster;
}

inline Kind kind_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Kind::f32;
    case ScalarType::BFloat16:
      return Kind::bf16;
    case ScalarType::Half:
      return Kind::f16;
    default:
      STD_TORCH_CHECK(false, "mole_cuda: expected ", name, " ", shape_of(t),
                      " in float32, bfloat16 or float16");
  }
  return Kind::f32;
}

inline Numbers numbers(const Maybe& t, const char* name) {
  if (!t) return {nullptr, Kind::f32};
  return {t->data_ptr(), kind_of(*t, name)};
}

// strides of dimensions with one element say nothing and may be anything: here they are what TMA takes
inline Operand tidy(Operand o) {
  if (o.size[1] == 1) o.stride[0] = (o.size[0] + 7) / 8 * 8;
  if (o.size[2] == 1) o.stride[1] = o.size[1] * o.stride[0];
  return o;
}

// [rows, columns] with unit columns, as one slab
inline Operand matrix(const Tensor& t) {
  return tidy({t.data_ptr(), {t.size(1), t.size(0), 1}, {t.stride(0), 0}});
}
// [slabs, rows, columns] with unit columns
inline Operand slabs(const Tensor& t) {
  return tidy({t.data_ptr(), {t.size(2), t.size(1), t.size(0)}, {t.stride(1), t.stride(0)}});
}

// why TMA cannot take this tensor; a layout is no error, another way may take it
inline void refuse_layout(std::string& reason, const Tensor& t, const char* name, const Operand& o) {
  if (!reason.empty()) return;
  const int64_t last = t.dim() - 1;
  if (t.size(last) != 1 && t.stride(last) != 1)
    reason = std::string(name) + " " + shape_of(t) + " has no contiguous last dimension (TMA)";
  else
    reason = layout_refusal(name, o);
}

// x or y [B,T,*] as groups of rows: the batch as one long group where samples share everything
inline Operand grouped(std::string& reason, const Tensor& t, const char* name, bool alone) {
  if (alone) return slabs(t);
  if (t.size(0) != 1 && t.size(1) != 1 && t.stride(0) != t.size(1) * t.stride(1))
    reason = std::string(name) + " " + shape_of(t) + " has samples that do not follow one another (TMA)";
  const int64_t rows = t.size(0) * t.size(1);
  return tidy({t.data_ptr(), {t.size(2), rows, 1}, {t.size(1) == 1 ? t.stride(0) : t.stride(1), 0}});
}

inline cudaStream_t current_stream(int device) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream, "mole_cuda: this torch has no CUDA");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

// apart: samples name their sets, and their rows stay apart. back: dX, whose product sums over N
inline Sizes sizes_of(int64_t B,
                      int64_t T,
                      int64_t K,
                      int64_t N,
                      int64_t R,
                      int64_t E,
                      int64_t S,
                      bool token,
                      bool pooled,
                      bool apart,
                      bool back) {
  const bool alone = S > 1 || pooled || apart;
  return {alone ? B : 1, alone ? T : B * T, back ? N : K, back ? K : N, R, E, token, pooled, back};
}

// scale [E], gate [B|1,T|1,E] and assignment [B], checked
inline void take_gates(Params& p,
                       const Tensor& scale,
                       const Maybe& gate,
                       const Maybe& assignment,
                       int64_t B,
                       int64_t T,
                       int64_t E,
                       int device) {
  expect(scale, "scale", {E}, device);
  STD_TORCH_CHECK(scale.is_contiguous(), "mole_cuda: expected a contiguous scale");
  p.scale = {scale.data_ptr(), kind_of(scale, "scale")};
  p.gate = numbers(gate, "gate");
  if (gate) {
    STD_TORCH_CHECK(gate->dim() == 3 && gate->is_cuda() && gate->get_device() == device &&
                        (gate->size(0) == 1 || gate->size(0) == B) &&
                        (gate->size(1) == 1 || gate->size(1) == T) && gate->size(2) == E,
                    "mole_cuda: expected gate broadcastable to [", B, ",", T, ",", E, "] on x's device, got ",
                    shape_of(*gate));
    p.gate_b = gate->size(0) == 1 ? 0 : gate->stride(0);
    p.gate_t = gate->size(1) == 1 ? 0 : gate->stride(1);
    p.gate_e = E == 1 ? 0 : gate->stride(2);
  }
  if (assignment) {
    expect(*assignment, "assignment", {B}, device);
    expect_type(*assignment, "assignment", ScalarType::Long);
    STD_TORCH_CHECK(assignment->is_contiguous(), "mole_cuda: expected a contiguous assignment");
    p.assignment = static_cast<const int64_t*>(assignment->data_ptr());
  }
}

inline void take_sizes(Params& p, const Sizes& s, int64_t T, int64_t S, const std::vector<int64_t>& ranks) {
  p.T = int32_t(T), p.N = int32_t(s.N), p.K = int32_t(s.K), p.R = int32_t(s.R), p.E = int32_t(s.E);
  p.span = int32_t(s.span), p.groups = int32_t(s.groups), p.sets = int32_t(S), p.token = s.token,
  p.pooled = s.pooled;
  int64_t sum = 0;
  for (int64_t e = 0; e < s.E; ++e) {
    STD_TORCH_CHECK(ranks[e] >= 0, "mole_cuda: expected ranks of at least 0, got ", ranks[e]);
    p.first[e + 1] = int32_t(sum += ranks[e]);
  }
  STD_TORCH_CHECK(sum == s.R, "mole_cuda: the ranks add up to ", sum, ", the rows of down are ", s.R);
}

// floats of z and of the shares of pooled logits, and counters, that a tile needs
struct Rooms {
  int64_t z, parts, flags;
  Rooms(const Tile& t, const Sizes& s) : z(0), parts(0), flags(0) {
    // dX's kernel leaves dh there, which is an output
    if (t.way == Way::persistent && !s.back) z = s.groups * s.span * s.R;
    if (s.pooled) parts = s.groups * t.row_tiles * t.slices * t.shape.warp_groups * s.E;
    if (s.pooled || t.way == Way::persistent) flags = Flags{int32_t(s.groups), int32_t(t.row_tiles)}.count();
  }
};

}  // namespace mole::sm90

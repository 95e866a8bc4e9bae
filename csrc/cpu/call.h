// The tensors of one call, checked and in the form that forward and backward read.
#pragma once

#include <vector>

#include "cpu/kernels.h"
#include "cpu/rows.h"
#include "tensors.h"

namespace mole {

// given gate [B|1,T|1,E] wide, strides 0 where it is broadcast
struct GivenGate {
  Maybe tensor;
  int64_t sample = 0, row = 0, expert = 0, size = 0;

  GivenGate(const Maybe& gate, ScalarType wide, int64_t wide_size) : tensor(as(gate, wide)), size(wide_size) {
    if (!tensor) return;
    sample = tensor->size(0) == 1 ? 0 : tensor->stride(0);
    row = tensor->size(1) == 1 ? 0 : tensor->stride(1);
    expert = tensor->stride(2);
  }
  const void* at(int64_t b, int64_t t) const {
    return tensor ? static_cast<const char*>(data(tensor)) + (b * sample + t * row) * size : nullptr;
  }
};

struct Call {
  int64_t B, T, K, N, R, S, E, top_k;
  std::vector<int64_t> starts;  // [E+1]
  std::vector<int64_t>
      set_of;  // [B]: 0 where the batch shares one, b where each sample has its own, or the assignment's
  ScalarType type, wide_type;
  Element element;
  const Kernels& k;
  Tensor x, weight, down, up, scale;
  GivenGate gate;
  Maybe token_weight, sample_weight;  // token_weight as the caller has it; sample_weight [S,R] wide
  Groups groups;
  Blocks blocks;

  Call(const Tensor& x,
       const Tensor& weight,
       const Tensor& down,
       const Tensor& up,
       const Tensor& scale,
       const std::vector<int64_t>& ranks,
       const Maybe& gate,
       const Maybe& token_weight,
       const Maybe& sample_weight,
       const Maybe& assignment,
       int64_t top_k);

  Rows rows(const Tensor& t) const {
    return {static_cast<const char*>(data(t)), k.element_size, t.stride(0), t.stride(1), t.stride(2)};
  }
  Rows x_rows() const { return rows(x); }
  // A as [K,R]: what x is multiplied with; and as [R,K], what dh is
  Sets down_k() const {
    return {static_cast<const char*>(data(down)), k.element_size, S == 1 ? 0 : down.stride(0), down.stride(2),
            down.stride(1)};
  }
  Sets down_r() const {
    return {static_cast<const char*>(data(down)), k.element_size, S == 1 ? 0 : down.stride(0), down.stride(1),
            down.stride(2)};
  }
  // B as [R,N]: what γh is multiplied with; and as [N,R], what dy is
  Sets up_r() const {
    return {static_cast<const char*>(data(up)), k.element_size, S == 1 ? 0 : up.stride(0), up.stride(2),
            up.stride(1)};
  }
  // W as [K,N] and as [N,K]
  Sets weight_k() const {
    return {static_cast<const char*>(data(weight)), k.element_size, 0, weight.stride(1), weight.stride(0)};
  }
  Sets weight_n() const {
    return {static_cast<const char*>(data(weight)), k.element_size, 0, weight.stride(0), weight.stride(1)};
  }
  Sets up_n() const {
    return {static_cast<const char*>(data(up)), k.element_size, S == 1 ? 0 : up.stride(0), up.stride(1),
            up.stride(2)};
  }

  // the gates of rows t… of sample b; token [B,T,E] and sample [B,E] wide or null
  RowGates gates(int64_t b, int64_t t, const char* token, const char* sample) const {
    return {data(scale),
            gate.at(b, t),
            gate.row,
            gate.expert,
            token ? token + (b * T + t) * E * k.wide_size : nullptr,
            sample ? sample + b * E * k.wide_size : nullptr,
            starts.data(),
            E};
  }
};

// whether our products make the base as well: they are faster here, x needs no copy, the rows pay for packing
// W and fill its tiles
bool fuses_base(const Call& c, const Tensor& left);

// wide bias, padded with zeros to whole panels; empty where there is none
Tensor wide_bias(const Call& c, const Maybe& bias);

// y [B,T,N] = x [B,T,K] · w [K,N] (+ bias): torch's own product, sample by sample where x is no matrix
void base_product(const Tensor& y, const Tensor& x, const Tensor& w, const Maybe& bias, int64_t B, int64_t T);

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& x,
                                                   const Tensor& weight,
                                                   const Maybe& bias,
                                                   const Tensor& down,
                                                   const Tensor& up,
                                                   const Tensor& scale,
                                                   const std::vector<int64_t>& ranks,
                                                   const Maybe& assignment,
                                                   const Maybe& gate,
                                                   const Maybe& token_weight,
                                                   const Maybe& token_bias,
                                                   const Maybe& sample_weight,
                                                   const Maybe& sample_bias,
                                                   int64_t top_k,
                                                   bool save);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& dy,
    const Tensor& x,
    const Tensor& weight,
    const Maybe& bias,
    const Tensor& down,
    const Tensor& up,
    const Tensor& scale,
    const std::vector<int64_t>& ranks,
    const Maybe& assignment,
    const Maybe& gate,
    const Maybe& token_weight,
    const Maybe& token_bias,
    const Maybe& sample_weight,
    const Maybe& sample_bias,
    int64_t top_k,
    bool save,
    const Tensor& h,
    const Tensor& token_gate,
    const Tensor& sample_gate,
    int64_t need);

}  // namespace mole

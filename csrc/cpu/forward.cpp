// y = x Wᵀ + b + (γ ⊙ x Aᵀ) Bᵀ without an expert's output ever being written.
//
//   shrink   h = x Aᵀ, kept wide (M × R), token logits from the same block of x while it is hot, column sums
//   for the sample gate expand   γ ⊙ h of a block, rounded once, times Bᵀ: added to torch's base in
//   registers, or, where our products are faster
//            than torch's, summed with x Wᵀ + b in the same registers, so that y is written once and rounded
//            once
#include <cmath>

#include "cpu/call.h"

namespace mole {
namespace {

// column sums of h, a row for each block of each sample, so that the order of the sum does not depend on
// threads
struct Sums {
  Tensor tensor;
  char* at;
  Sums(const Call& c, int64_t blocks)
      : tensor(empty({c.B, blocks, c.R}, c.wide_type)), at(static_cast<char*>(data(tensor))) {
    std::fill(at, at + c.B * blocks * c.R * c.k.wide_size, char(0));
  }
};

// G[b,e] = sigmoid(Σ_{r in e} sample_weight_r · mean_t h_r + sample_bias_e)
template <class W>
void sample_gates(const Call& c, const W* sums, int64_t blocks, const W* bias, W* out) {
  const W* sample_weight = static_cast<const W*>(data(c.sample_weight));
  for (int64_t b = 0; b < c.B; ++b)
    for (int64_t e = 0; e < c.E; ++e) {
      double logit = 0;
      for (int64_t r = c.starts[e]; c.set_of[b] >= 0 && r < c.starts[e + 1]; ++r) {
        double sum = 0;
        for (int64_t i = 0; i < blocks; ++i) sum += sums[(b * blocks + i) * c.R + r];
        logit += sum * sample_weight[c.set_of[b] * c.R + r];
      }
      logit = logit / std::max<int64_t>(c.T, 1) + (bias ? bias[e] : W(0));
      out[b * c.E + e] = W(1 / (1 + std::exp(-logit)));
    }
}

// token_weight as operands [E,K] with k side by side
const char* token_rows(const Call& c, Tensor& keep) {
  const Kernels& k = c.k;
  // NOLINTNEXTLINE(bugprone-unchecked-optional-access): called with a token gate alone
  if (k.element_size == k.operand_size && c.token_weight->stride(1) == 1 && c.token_weight->stride(0) == c.K)
    return static_cast<const char*>(data(c.token_weight));
  keep = empty({c.E, c.K}, k.operand_size == k.element_size ? c.type : c.wide_type);
  // NOLINTNEXTLINE(bugprone-unchecked-optional-access): the same
  k.to_operand(data(c.token_weight), c.token_weight->stride(0), c.token_weight->stride(1), c.E, c.K,
               data(keep), c.K);
  return static_cast<const char*>(data(keep));
}

}  // namespace

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
                                                   bool save) {
  const Call c(x, weight, down, up, scale, ranks, gate, token_weight, sample_weight, assignment, top_k);
  const Kernels& k = c.k;
  const Maybe offset = dense(as(token_bias, c.wide_type)),
              sample_offset = dense(as(sample_bias, c.wide_type));
  STD_TORCH_CHECK(!offset || offset->numel() == c.E, "mole_cpu: expected token_bias [E]");
  STD_TORCH_CHECK(!sample_offset || sample_offset->numel() == c.E, "mole_cpu: expected sample_bias [E]");

  Tensor y = empty({c.B, c.T, c.N}, c.type);
  // rows without a set are the base layer's to the bit: torch's own product, of the whole batch as the base
  // layer has it
  const bool fuse = fuses_base(c, x) && c.groups.none() == 0;
  if (!fuse) base_product(y, x, matrix(weight, c.K, c.N, weight.stride(1), weight.stride(0)), bias, c.B, c.T);

  const bool h_is_wide = c.type == c.wide_type;
  Tensor wide = empty({c.B, c.T, c.R}, c.wide_type);
  Tensor h = !save ? empty({0}, c.type) : h_is_wide ? wide : empty({c.B, c.T, c.R}, c.type);
  Tensor token = token_weight ? empty({c.B, c.T, c.E}, c.wide_type) : empty({0}, c.wide_type);
  Tensor sample = sample_weight ? empty({c.B, c.E}, c.wide_type) : empty({0}, c.wide_type);
  char *rows_h = static_cast<char*>(data(wide)), *out_h = static_cast<char*>(data(h)),
       *out_token = static_cast<char*>(data(token));
  Tensor keep = empty({0}, c.type);
  const char* gate_rows = token_weight ? token_rows(c, keep) : nullptr;
  const Blocks& blocks = c.blocks;
  std::optional<Sums> sums;
  if (sample_weight) sums.emplace(c, blocks.per_sample);

  shrink(k, c.groups, blocks, c.x_rows(), c.K, c.down_k(), c.R, rows_h,
         [&](int64_t b, int64_t t, int64_t rows, const Product& left, int64_t from, bool last) {
           const int64_t row = b * c.T + t;
           char *line = rows_h + row * c.R * k.wide_size, *logits = out_token + row * c.E * k.wide_size;
           if (token_weight)
             k.row_dots(left.a, left.a_row, rows, left.k, gate_rows + from * k.operand_size, c.K, c.E, logits,
                        from > 0);
           if (!last) return;
           if (token_weight && c.top_k)
             k.softmax(logits, rows, c.E, data(offset), c.top_k);
           else if (token_weight)
             k.sigmoid(logits, rows, c.E, data(offset));
           if (sample_weight)
             k.column_sums(line, c.R, rows, c.R,
                           sums->at + (b * blocks.per_sample + t / blocks.rows) * c.R * k.wide_size);
           if (save && !h_is_wide) k.narrow(line, c.R, rows, c.R, out_h + row * c.R * k.element_size, c.R);
         });
  if (sample_weight) {
    if (c.wide_type == ScalarType::Double)
      sample_gates(c, reinterpret_cast<double*>(sums->at), blocks.per_sample,
                   static_cast<double*>(data(sample_offset)), static_cast<double*>(data(sample)));
    else
      sample_gates(c, reinterpret_cast<float*>(sums->at), blocks.per_sample,
                   static_cast<float*>(data(sample_offset)), static_cast<float*>(data(sample)));
  }

  const char *token_at = token_weight ? out_token : nullptr,
             *sample_at = sample_weight ? static_cast<char*>(data(sample)) : nullptr;
  const auto gated = [&](int64_t b, int64_t t, int64_t rows) {
    char* out = Scratch::get(Scratch::GATED, rows * c.R * k.operand_size);
    k.gate(rows_h + (b * c.T + t) * c.R * k.wide_size, c.R, rows, c.gates(b, t, token_at, sample_at), nullptr,
           out, c.R, false);
    return Product{out, c.R, 1, nullptr, c.R};
  };
  char* out_y = static_cast<char*>(data(y));
  if (fuse) {
    const Tensor wide_b = wide_bias(c, bias);
    const Sets w[2] = {c.weight_k(), c.up_r()};
    const int64_t depth[2] = {c.K, c.R};
    fused(k, c.groups, blocks, c.x_rows(), c.N, w, depth, 2, out_y,
          bias ? static_cast<char*>(data(wide_b)) : nullptr,
          [&](int64_t b, int64_t t, int64_t rows, Product* p) { p[1] = gated(b, t, rows); });
  } else {
    const Sets w[1] = {c.up_r()};
    const int64_t depth[1] = {c.R};
    expand(k, c.groups, blocks, c.N, w, depth, 0, 1, out_y, true, nullptr,
           [&](int64_t b, int64_t t, int64_t rows, Product* p) { p[0] = gated(b, t, rows); });
  }
  return {y, h, token, sample};
}

}  // namespace mole

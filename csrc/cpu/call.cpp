#include "cpu/call.h"

namespace mole {
namespace {

Element element_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return F32;
    case ScalarType::Double:
      return F64;
    case ScalarType::BFloat16:
      return BF16;
    case ScalarType::Half:
      return F16;
    default:
      STD_TORCH_CHECK(false, "mole_cpu: expected x of float32, float64, bfloat16 or float16");
  }
  return F32;
}

void expect(const Tensor& t, const char* name, ScalarType type, std::initializer_list<int64_t> sizes) {
  bool good = t.is_cpu() && t.scalar_type() == type && t.dim() == int64_t(sizes.size());
  for (int64_t i = 0; good && i < int64_t(sizes.size()); ++i) good = t.size(i) == sizes.begin()[i];
  STD_TORCH_CHECK(good, "mole_cpu: expected ", name, " ", shape_text(sizes), " ", dtype_text(type),
                  " on cpu, got ", describe(t));
}

// the set of each sample; an assignment is read here and nowhere else, so that no value of it can reach
// memory unchecked
std::vector<int64_t> sets_of(int64_t B, int64_t S, const Maybe& assignment) {
  std::vector<int64_t> set_of(B, 0);
  if (assignment) {
    STD_TORCH_CHECK(assignment->is_cpu() && assignment->scalar_type() == ScalarType::Long &&
                        assignment->dim() == 1 && assignment->size(0) == B,
                    "mole_cpu: expected assignment [", B, "] int64 on cpu, got ", describe(*assignment));
    const int64_t *from = static_cast<const int64_t*>(data(*assignment)), step = assignment->stride(0);
    for (int64_t b = 0; b < B; ++b) {
      set_of[b] = from[b * step];
      STD_TORCH_CHECK(set_of[b] >= -1 && set_of[b] < S, "mole_cpu: expected assignment between -1 and ",
                      S - 1, ", got ", set_of[b], " for sample ", b);
    }
  } else {
    STD_TORCH_CHECK(S == 1 || S == B, "mole_cpu: expected down [S,R,K] with S = 1 or B = ", B,
                    ", got S = ", S);
    for (int64_t b = 0; b < B && S != 1; ++b) set_of[b] = b;
  }
  return set_of;
}

}  // namespace

Call::Call(const Tensor& x,
           const Tensor& weight,
           const Tensor& down,
           const Tensor& up,
           const Tensor& scale,
           const std::vector<int64_t>& ranks,
           const Maybe& gate,
           const Maybe& token_weight,
           const Maybe& sample_weight,
           const Maybe& assignment,
           int64_t top_k)
    : top_k(top_k),
      set_of(sets_of(x.size(0), down.size(0), assignment)),
      type(x.scalar_type()),
      wide_type(type == ScalarType::Double ? ScalarType::Double : ScalarType::Float),
      element(element_of(type)),
      k(kernels(element)),
      x(x),
      weight(weight),
      down(down),
      up(up),
      scale(dense(as(scale, wide_type))),
      gate(gate, wide_type, k.wide_size),
      token_weight(token_weight),
      sample_weight(dense(as(sample_weight, wide_type))),
      groups(set_of),
      blocks(k, groups.smallest(), x.size(1)) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 3 && weight.dim() == 2 && down.dim() == 3,
                  "mole_cpu: expected x [B,T,K] on cpu, weight [N,K], down [S,R,K], got ", describe(x), ", ",
                  describe(weight), ", ", describe(down));
  B = x.size(0), T = x.size(1), K = x.size(2), N = weight.size(0), S = down.size(0), R = down.size(1),
  E = int64_t(ranks.size());
  STD_TORCH_CHECK(top_k >= 0 && (top_k == 0 || token_weight),
                  "mole_cpu: expected top_k = 0, or k ≥ 1 with token_weight, got ", top_k);
  starts.assign(1, 0);
  for (int64_t r : ranks) starts.push_back(starts.back() + r);
  STD_TORCH_CHECK(starts.back() == R, "mole_cpu: expected ranks that add up to the rows of down, ", R,
                  ", got ", starts.back());
  expect(weight, "weight", type, {N, K});
  expect(down, "down", type, {S, R, K});
  expect(up, "up", type, {S, N, R});
  expect(this->scale, "scale", wide_type, {E});
  if (token_weight) expect(*token_weight, "token_weight", type, {E, K});
  // NOLINTNEXTLINE(bugprone-unchecked-optional-access): the member is made of the argument that is asked
  if (sample_weight) expect(*this->sample_weight, "sample_weight", wide_type, {S, R});
  if (gate) {
    // NOLINTNEXTLINE(bugprone-unchecked-optional-access): the same
    const Tensor& g = *this->gate.tensor;
    STD_TORCH_CHECK(g.dim() == 3 && (g.size(0) == 1 || g.size(0) == B) &&
                        (g.size(1) == 1 || g.size(1) == T) && g.size(2) == E,
                    "mole_cpu: expected gate broadcastable to [", B, ",", T, ",", E, "], got ", describe(g));
  }
}

bool fuses_base(const Call& c, const Tensor& left) {
  // by the smallest group and not by the batch, so that nobody's bits depend on who else is in it
  const bool enough = c.groups.smallest() * c.T >= kFewRows;
  return beats_torch(c.element) && left.stride(2) == 1 && enough && c.K > 0 && c.N > 0;
}

Tensor wide_bias(const Call& c, const Maybe& bias) {
  if (!bias) return empty({0}, c.wide_type);
  STD_TORCH_CHECK(bias->numel() == c.N && bias->scalar_type() == c.type, "mole_cpu: expected bias [", c.N,
                  "] ", dtype_text(c.type), ", got ", describe(*bias));
  const int64_t padded = round_up(c.N, c.k.panel_cols);
  Tensor out = empty({padded}, c.wide_type);
  char* at = static_cast<char*>(data(out));
  std::fill(at + c.N * c.k.wide_size, at + padded * c.k.wide_size, char(0));
  const Tensor from = dense(*bias);
  c.k.widen(data(from), c.N, 1, c.N, at, c.N);
  return out;
}

void base_product(
    const Tensor& y, const Tensor& x, const Tensor& w, const Maybe& bias, int64_t B, int64_t T) {
  const int64_t K = x.size(2), N = y.size(2);
  if (B == 0 || T == 0 || N == 0) return;
  if (B == 1 || x.stride(0) == T * x.stride(1)) {
    product(matrix(y, B * T, N, N, 1), bias, matrix(x, B * T, K, x.stride(1), x.stride(2)), w);
    return;
  }
  for (int64_t b = 0; b < B; ++b)
    product(matrix(y, T, N, N, 1, b * T * N), bias,
            matrix(x, T, K, x.stride(1), x.stride(2), b * x.stride(0)), w);
}

}  // namespace mole

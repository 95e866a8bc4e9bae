// The gradients, from x, h (ungated) and the gates alone; no expert output is ever formed.
//
//   V = dy·B   D_e = ⟨V,h⟩_e   dh = γ ⊙ V + dq·p/T   dlogit = γ(1−l)D   dq = Σ_t γ(1−G)D
//   dx = dy·W + [dh | dlogit]·[A ; Φ]   [dA ; dΦ] = [dh | dlogit]ᵀ x   dBᵀ = (γ ⊙ h)ᵀ dy
#include "cpu/call.h"

namespace mole {
namespace {

enum Need {
  X = 1,
  DOWN = 2,
  UP = 4,
  SCALE = 8,
  GATE = 16,
  TOKEN_WEIGHT = 32,
  TOKEN_BIAS = 64,
  SAMPLE_WEIGHT = 128,
  SAMPLE_BIAS = 256
};

template <class W>
W* at(const Tensor& t) {
  return static_cast<W*>(data(t));
}

// the gates' own gradients from D [B,T,E]; sums are kept in double
template <class W>
struct GateGradients {
  const Call& c;
  const W *token, *sample;
  Tensor scale, gate, dlogit, token_bias, dq, sample_bias;

  GateGradients(const Call& c, const W* token, const W* sample)
      : c(c),
        token(token),
        sample(sample),
        scale(empty({c.E}, c.wide_type)),
        gate(gate_like(c)),
        dlogit(empty({c.B, c.T, token ? c.E : 0}, c.wide_type)),
        token_bias(empty({c.E}, c.wide_type)),
        dq(empty({c.B, c.E}, c.wide_type)),
        sample_bias(empty({c.E}, c.wide_type)) {}

  static Tensor gate_like(const Call& c) {
    const Maybe& g = c.gate.tensor;
    return g ? empty({g->size(0), g->size(1), g->size(2)}, c.wide_type) : empty({0}, c.wide_type);
  }

  // γ_e D_e -> γ_e D_e − l_e Σ_f γ_f D_f, for the tokens of one sample
  void through_softmax(int64_t b, std::vector<double>& dtoken_weight) {
    for (int64_t t = 0; t < c.T; ++t) {
      const int64_t m = (b * c.T + t) * c.E;
      W* d = at<W>(dlogit) + m;
      double sum = 0;
      for (int64_t e = 0; e < c.E; ++e) sum += d[e];
      for (int64_t e = 0; e < c.E; ++e) {
        const double left = d[e] - token[m + e] * sum;
        d[e] = W(left), dtoken_weight[e] += left;
      }
    }
  }

  void run(const W* D) {
    std::vector<double> ds(c.E), dtoken_weight(c.E), dsample_weight(c.E),
        dgate(c.gate.tensor ? gate.numel() : 0);
    const int64_t gate_b = c.gate.tensor && gate.size(0) > 1 ? gate.size(1) * c.E : 0,
                  gate_t = c.gate.tensor && gate.size(1) > 1 ? c.E : 0;
    const W* s = at<W>(c.scale);
    if (token) std::fill(at<W>(dlogit), at<W>(dlogit) + c.B * c.T * c.E, W(0));
    std::fill(at<W>(dq), at<W>(dq) + c.B * c.E, W(0));
    for (int64_t b = 0; b < c.B; ++b) {
      if (c.set_of[b] < 0) continue;
      for (int64_t e = 0; e < c.E; ++e) {
        const W G = sample ? sample[b * c.E + e] : W(1);
        double q = 0;
        for (int64_t t = 0; t < c.T; ++t) {
          const int64_t m = (b * c.T + t) * c.E + e;
          const W l = token ? token[m] : W(1),
                  given = c.gate.tensor ? static_cast<const W*>(c.gate.at(b, t))[e * c.gate.expert] : W(1);
          const double d = D[m], through = double(l) * G * d, gamma = double(s[e]) * given * through;
          ds[e] += given * through;
          if (c.gate.tensor) dgate[b * gate_b + t * gate_t + e] += s[e] * through;
          if (token && c.top_k)
            at<W>(dlogit)[m] = W(gamma);
          else if (token)
            at<W>(dlogit)[m] = W(gamma * (1 - l)), dtoken_weight[e] += gamma * (1 - l);
          q += gamma * (1 - G);
        }
        at<W>(dq)[b * c.E + e] = W(q);
        dsample_weight[e] += q;
      }
      if (token && c.top_k) through_softmax(b, dtoken_weight);
    }
    for (int64_t e = 0; e < c.E; ++e)
      at<W>(scale)[e] = W(ds[e]), at<W>(token_bias)[e] = W(dtoken_weight[e]),
      at<W>(sample_bias)[e] = W(dsample_weight[e]);
    for (size_t i = 0; i < dgate.size(); ++i) at<W>(gate)[i] = W(dgate[i]);
  }
};

// the work of one call, in the wide type of its elements
template <class W>
struct Backward {
  const Call& c;
  const Kernels& k;
  const Tensor &dy, &h, &token_gate, &sample_gate;
  const int64_t need;
  const char *token, *sample;
  GateGradients<W> gates;

  Backward(const Call& c,
           const Tensor& dy,
           const Tensor& h,
           const Tensor& token_gate,
           const Tensor& sample_gate,
           int64_t need)
      : c(c),
        k(c.k),
        dy(dy),
        h(h),
        token_gate(token_gate),
        sample_gate(sample_gate),
        need(need),
        token(c.token_weight ? static_cast<const char*>(data(token_gate)) : nullptr),
        sample(c.sample_weight ? static_cast<const char*>(data(sample_gate)) : nullptr),
        gates(c, reinterpret_cast<const W*>(token), reinterpret_cast<const W*>(sample)) {}

  bool none(const Tensor& t) const { return t.numel() == 0; }
  int64_t row(int64_t b, int64_t t) const { return b * c.T + t; }

  // saved h of some rows, wide
  const W* wide_h(int64_t b, int64_t t, int64_t rows) const {
    const char* saved = static_cast<const char*>(data(h)) + row(b, t) * c.R * k.element_size;
    if (k.element_size == k.wide_size) return reinterpret_cast<const W*>(saved);
    char* copy = Scratch::get(Scratch::WIDE, rows * c.R * k.wide_size);
    k.widen(saved, c.R, rows, c.R, copy, c.R);
    return reinterpret_cast<const W*>(copy);
  }

  // V = dy·B, then dh in its place; D on the way
  Tensor thin_gradient() {
    Tensor v = empty({c.B, c.T, c.R}, c.wide_type), d = empty({c.B, c.T, c.E}, c.wide_type);
    W *pv = at<W>(v), *pd = at<W>(d);
    shrink(k, c.groups, c.blocks, c.rows(dy), c.N, c.up_n(), c.R, reinterpret_cast<char*>(pv),
           [&](int64_t b, int64_t t, int64_t rows, const Product&, int64_t, bool last) {
             if (last)
               k.expert_dots(pv + row(b, t) * c.R, c.R, wide_h(b, t, rows), c.R, rows, c.starts.data(), c.E,
                             pd + row(b, t) * c.E);
           });
    gates.run(pd);
    std::vector<W> add(c.sample_weight ? c.B * c.R : 0);
    for (int64_t b = 0; c.sample_weight && b < c.B; ++b)
      for (int64_t e = 0; c.set_of[b] >= 0 && e < c.E; ++e)
        for (int64_t r = c.starts[e]; r < c.starts[e + 1]; ++r)
          add[b * c.R + r] =
              at<W>(gates.dq)[b * c.E + e] * at<W>(*c.sample_weight)[c.set_of[b] * c.R + r] / W(c.T);
    c.blocks.each(c.groups.taken(), [&](int64_t b, int64_t t, int64_t rows) {
      W* line = pv + row(b, t) * c.R;
      k.gate(line, c.R, rows, c.gates(b, t, token, sample), c.sample_weight ? add.data() + b * c.R : nullptr,
             line, c.R, true);
    });
    return v;
  }

  // operands of wide rows
  Product operands(const W* rows_at, int64_t width, int64_t rows, Scratch::Use use) const {
    if (k.operand_size == k.wide_size) return {rows_at, width, 1, nullptr, width};
    char* copy = Scratch::get(use, rows * width * k.operand_size);
    k.narrow(rows_at, width, rows, width, copy, width);
    return {copy, width, 1, nullptr, width};
  }

  // dx = dy·W + [dh | dlogit]·[A ; Φ]
  Tensor input_gradient(const Tensor& dh) const {
    Tensor dx = empty({c.B, c.T, c.K}, c.type);
    const Tensor& token_weight = c.token_weight ? *c.token_weight : c.weight;
    const Sets w[3] = {c.weight_n(),
                       c.down_r(),
                       {static_cast<const char*>(data(token_weight)), k.element_size, 0,
                        token_weight.stride(0), token_weight.stride(1)}};
    const int64_t depth[3] = {c.N, c.R, c.E};
    const auto fill = [&](int64_t b, int64_t t, int64_t rows, Product* p) {
      p[0] = operands(at<W>(dh) + row(b, t) * c.R, c.R, rows, Scratch::GATED);
      if (c.token_weight) p[1] = operands(at<W>(gates.dlogit) + row(b, t) * c.E, c.E, rows, Scratch::LEFT);
    };
    const int thin = c.token_weight ? 2 : 1;
    char* out = static_cast<char*>(data(dx));
    if (none(dx)) return dx;
    if (fuses_base(c, dy)) {
      fused(k, c.groups, c.blocks, c.rows(dy), c.K, w, depth, thin + 1, out, nullptr,
            [&](int64_t b, int64_t t, int64_t rows, Product* p) { fill(b, t, rows, p + 1); });
    } else {
      base_product(dx, dy, c.weight, std::nullopt, c.B, c.T);
      expand(k, c.groups, c.blocks, c.K, {w[1], w[2]}, {depth[1], depth[2]}, 0, thin, out, true, nullptr,
             fill);
    }
    return dx;
  }

  // out[s] [L,cols] = Σ leftᵀ right over the samples of each set; zeros for a set that no sample takes
  template <class Left>
  Tensor reduced(int64_t L, const Left& left, const Rows& right, int64_t cols) const {
    Tensor out = empty({c.S, L, cols}, c.wide_type);
    std::vector<bool> taken(c.S);
    const auto begin = [&](int64_t s) { return static_cast<char*>(data(out)) + s * L * cols * k.wide_size; };
    for (const Group& g : c.groups) {
      if (g.set < 0) continue;
      reduce(k, g, c.T, L, left, right, cols, begin(g.set));
      taken[g.set] = true;
    }
    for (int64_t s = 0; s < c.S; ++s)
      if (!taken[s]) std::fill(begin(s), begin(s + 1), char(0));
    return out;
  }

  Tensor down_gradient(const Tensor& dh) const {
    return reduced(
        c.R, [&](int64_t b, int64_t t, int64_t) { return at<W>(dh) + row(b, t) * c.R; }, c.x_rows(), c.K);
  }

  Tensor token_weight_gradient() const {
    Tensor out = empty({c.E, c.K}, c.wide_type);
    reduce(
        k, c.groups.taken(), c.T, c.E,
        [&](int64_t b, int64_t t, int64_t) { return at<W>(gates.dlogit) + row(b, t) * c.E; }, c.x_rows(), c.K,
        static_cast<char*>(data(out)));
    return out;
  }

  // dB [S,N,R], made as dBᵀ so that the wide side of the product is the packed one
  Tensor up_gradient() const {
    Tensor t = reduced(
        c.R,
        [&](int64_t b, int64_t t0, int64_t rows) {
          W* gated = reinterpret_cast<W*>(Scratch::get(Scratch::GATED, rows * c.R * k.wide_size));
          k.gate(wide_h(b, t0, rows), c.R, rows, c.gates(b, t0, token, sample), nullptr, gated, c.R, true);
          return static_cast<const W*>(gated);
        },
        c.rows(dy), c.N);
    Tensor out = empty({c.S, c.N, c.R}, c.type);
    for (int64_t s = 0; s < c.S; ++s)
      k.narrow_turned(at<W>(t) + s * c.R * c.N, c.N, c.R, c.N,
                      static_cast<char*>(data(out)) + s * c.N * c.R * k.element_size, c.R);
    return out;
  }

  // dp[s,r] = Σ_b dq[b,e(r)] · mean_t h[b,t,r]
  Tensor sample_weight_gradient() const {
    Tensor out = empty({c.S, c.R}, c.wide_type);
    std::vector<double> total(c.S * c.R);
    std::vector<W> sums(c.R);
    for (int64_t b = 0; b < c.B; ++b) {
      if (c.set_of[b] < 0) continue;
      std::vector<double> sample_sum(c.R);
      for (int64_t t = 0; t < c.T; t += kBlockRows) {
        const int64_t rows = std::min(kBlockRows, c.T - t);
        std::fill(sums.begin(), sums.end(), W(0));
        k.column_sums(wide_h(b, t, rows), c.R, rows, c.R, sums.data());
        for (int64_t r = 0; r < c.R; ++r) sample_sum[r] += sums[r];
      }
      for (int64_t e = 0; e < c.E; ++e)
        for (int64_t r = c.starts[e]; r < c.starts[e + 1]; ++r)
          total[c.set_of[b] * c.R + r] +=
              at<W>(gates.dq)[b * c.E + e] * sample_sum[r] / std::max<int64_t>(c.T, 1);
    }
    for (size_t i = 0; i < total.size(); ++i) at<W>(out)[i] = W(total[i]);
    return out;
  }

  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> run(
      ScalarType scale, ScalarType gate, ScalarType sample_weight) {
    const Tensor no = empty({0}, c.type);
    const Tensor dh = need & ~UP ? thin_gradient() : no;
    return {need & X ? input_gradient(dh) : no,
            need & DOWN ? as(down_gradient(dh), c.type) : no,
            need & UP ? up_gradient() : no,
            need & SCALE ? as(gates.scale, scale) : no,
            need & GATE ? as(gates.gate, gate) : no,
            need & TOKEN_WEIGHT ? as(token_weight_gradient(), c.type) : no,
            need & TOKEN_BIAS ? gates.token_bias : no,
            need & SAMPLE_WEIGHT ? as(sample_weight_gradient(), sample_weight) : no,
            need & SAMPLE_BIAS ? gates.sample_bias : no};
  }
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& dy_,
    const Tensor& x,
    const Tensor& weight,
    const Maybe& /*bias*/,
    const Tensor& down,
    const Tensor& up,
    const Tensor& scale,
    const std::vector<int64_t>& ranks,
    const Maybe& assignment,
    const Maybe& gate,
    const Maybe& token_weight,
    const Maybe& /*token_bias*/,
    const Maybe& sample_weight,
    const Maybe& /*sample_bias*/,
    int64_t top_k,
    bool /*save*/,
    const Tensor& h_,
    const Tensor& token_gate,
    const Tensor& sample_gate,
    int64_t need) {
  const Call c(x, weight, down, up, scale, ranks, gate, token_weight, sample_weight, assignment, top_k);
  const Tensor dy = dense(as(dy_, c.type)), h = dense(as(h_, c.type));
  STD_TORCH_CHECK(dy.numel() == c.B * c.T * c.N && h.numel() == c.B * c.T * c.R,
                  "mole_cpu: expected dy [B,T,N] and h [B,T,R] of the forward");
  const Tensor token = dense(as(token_gate, c.wide_type)), sample = dense(as(sample_gate, c.wide_type));
  STD_TORCH_CHECK(
      (!token_weight || token.numel() == c.B * c.T * c.E) && (!sample_weight || sample.numel() == c.B * c.E),
      "mole_cpu: expected the gates of the forward");
  // a gradient of what the call lacks is empty
  need &= ~((gate ? 0 : GATE) | (token_weight ? 0 : TOKEN_WEIGHT | TOKEN_BIAS) |
            (sample_weight ? 0 : SAMPLE_WEIGHT | SAMPLE_BIAS));
  const ScalarType gate_type = gate ? gate->scalar_type() : c.wide_type,
                   sample_weight_type = sample_weight ? sample_weight->scalar_type() : c.wide_type;
  if (c.wide_type == ScalarType::Double)
    return Backward<double>(c, dy, h, token, sample, need)
        .run(scale.scalar_type(), gate_type, sample_weight_type);
  return Backward<float>(c, dy, h, token, sample, need)
      .run(scale.scalar_type(), gate_type, sample_weight_type);
}

}  // namespace mole

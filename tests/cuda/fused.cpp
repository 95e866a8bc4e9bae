// One call of an sm_90 kernel in the emulator, held to float64.
//
//   fused way=cluster b=2 t=70 k=72 n=136 ranks=8,16 groups=1 cluster=2 token=1 pooled=0 mask=0 sets=1 save=1
//   dtype=bf16 seed=3
//
// An element of y may be off by half a unit of its last place, by 1e-6 of y's typical size, and by what a z
// within 1e-6 of a rounding boundary makes when it falls to the other side. h is held to half a unit, the
// gates to 1e-6.
#include "truth.h"

namespace {

struct Case {
  std::string way;
  int B, T, K, N, S, warp_groups, columns, extra, cluster, top_k;
  std::vector<int> ranks;
  bool token, pooled, mask, save, assigned;
  uint64_t seed;
  unsigned resident;
  int R() const {
    int sum = 0;
    for (int r : ranks) sum += r;
    return sum;
  }
  int E() const { return int(ranks.size()); }
  // the set of a sample; with an assignment the last ones first, and none for the first sample
  int set(int b) const { return assigned ? (b == 0 ? -1 : (S - 1 - b % S)) : S > 1 ? b : 0; }
};

// the tensors of one call
template <class T>
struct Tensors {
  emu::Input<T> x, w, bias, down, up, token_weight;
  emu::Input<float> scale, token_bias, sample_weight, sample_bias, gate;
  emu::Output<T> y, h;
  emu::Output<float> token_gate;
  emu::Memory<float> sample_gate, z, parts;
  emu::Memory<uint32_t> flags;
  emu::Input<int64_t> assignment;

  explicit Tensors(const Case& c, size_t n_z, size_t n_parts, size_t n_flags)
      : x("x", size_t(c.B) * c.T * c.K),
        w("w", size_t(c.N) * c.K),
        bias("bias", c.N),
        down("down", size_t(c.S) * c.R() * c.K),
        up("up", size_t(c.S) * c.N * c.R()),
        token_weight("token_weight", size_t(c.E()) * c.K),
        scale("scale", c.E()),
        token_bias("token_bias", c.E()),
        sample_weight("sample_weight", size_t(c.S) * c.R()),
        sample_bias("sample_bias", c.E()),
        gate("gate", size_t(c.T) * c.E()),
        y("y", size_t(c.B) * c.T * c.N),
        h("h", c.save ? size_t(c.B) * c.T * c.R() : 1),
        token_gate("token_gate", c.token ? size_t(c.B) * c.T * c.E() : 1),
        sample_gate("sample_gate", size_t(c.B) * c.E(), NAN),
        z("z", n_z + 1, NAN),
        parts("parts", n_parts + 1, NAN),
        flags("flags", n_flags + 1, 0),
        assignment("assignment", c.B) {
    for (int b = 0; b < c.B; ++b) assignment[b] = c.set(b);
    emu::Random random(c.seed);
    const double in = 1 / std::sqrt(double(c.K)), rank = 1 / std::sqrt(double(c.R()));
    fill(x, random, 1), fill(w, random, in), fill(bias, random, 1), fill(down, random, in),
        fill(up, random, rank), fill(token_weight, random, 3 * in);
    fill(token_bias, random, 1), fill(sample_weight, random, 3), fill(sample_bias, random, 1),
        fill(gate, random, 1);
    for (int e = 0; e < c.E(); ++e) scale[e] = 0.5f + float(e);
  }
};

Params params_of(const Case& c, const Tile& t, const Sizes& s) {
  Params p{};
  p.T = c.T, p.N = c.N, p.K = c.K, p.R = c.R(), p.E = c.E();
  p.span = int32_t(s.span), p.groups = int32_t(s.groups);
  p.row_tiles = int32_t(t.row_tiles), p.column_tiles = int32_t(t.column_tiles), p.slice = t.slice,
  p.slices = t.slices, p.stages = t.stages;
  p.sets = c.S, p.top_k = c.top_k, p.token = c.token, p.pooled = c.pooled, p.save = c.save;
  p.gate_t = c.E(), p.gate_e = 1, p.pool_set = c.R();
  for (int e = 0; e < c.E(); ++e) p.first[e + 1] = p.first[e] + c.ranks[e];
  return p;
}

template <class T, int GROUPS, int BN, int NX>
void run(const Case& c, const Tile& t, const Maps& maps, const Params& p) {
  emu::Launch launch;
  launch.grid = dim3(t.grid), launch.block = dim3(128 * (GROUPS + 1)), launch.cluster = dim3(t.cluster);
  launch.smem = size_t(t.shared), launch.seed = c.seed, launch.resident = c.resident;
  // what ptxas gives these kernels at launch
  launch.registers = GROUPS == 1 ? 240 : 168;
  if (c.way == "persistent")
    emu::launch(launch, [&] { persistent_kernel<T, GROUPS, BN, NX>(maps, p); });
  else if (c.way == "cluster")
    emu::launch(launch, [&] { tile_kernel<T, GROUPS, BN, NX, true>(maps, p); });
  else
    emu::launch(launch, [&] { tile_kernel<T, GROUPS, BN, NX, false>(maps, p); });
}

// l of one row in float64
template <class T>
std::vector<double> token_gates(const Case& c, const Tensors<T>& d, int m) {
  std::vector<double> logit(c.E()), l(c.E(), 0.0);
  for (int e = 0; c.token && e < c.E(); ++e) {
    logit[e] = d.token_bias[e];
    for (int k = 0; k < c.K; ++k)
      logit[e] += double(to_float(d.x[size_t(m) * c.K + k])) * to_float(d.token_weight[size_t(e) * c.K + k]);
    l[e] = 1 / (1 + std::exp(-logit[e]));
  }
  if (!c.token || !c.top_k) return l;
  double sum = 0;
  for (int e = 0; e < c.E(); ++e) {
    int before = 0;
    for (int other = 0; other < c.E(); ++other) before += logit[other] > logit[e];
    l[e] = before < c.top_k ? std::exp(logit[e]) : 0;
    sum += l[e];
  }
  for (double& v : l) v /= sum;
  return l;
}

// y [M,N], h, l, G in float64; slack: what ambiguous roundings of z may do to y
template <class T>
int compare(const Case& c, const Tensors<T>& d) {
  const int M = c.B * c.T, K = c.K, N = c.N, R = c.R(), E = c.E();
  std::vector<int> owner;
  for (int e = 0; e < E; ++e) owner.insert(owner.end(), c.ranks[e], e);
  std::vector<double> h(size_t(M) * R), gate(size_t(c.B) * E, 1.0);
  const auto set = [&](int m) { return std::max(0, c.set(m / c.T)); };
  const auto none = [&](int m) { return c.set(m / c.T) < 0; };
  double worst_h = 0, worst_gate = 0, worst = 0, square = 0;
  for (int m = 0; m < M; ++m)
    for (int r = 0; r < R; ++r) {
      double sum = 0;
      for (int k = 0; k < K && !none(m); ++k)
        sum += double(to_float(d.x[size_t(m) * K + k])) * to_float(d.down[(size_t(set(m)) * R + r) * K + k]);
      h[size_t(m) * R + r] = sum;
      if (c.save)
        worst_h = std::max(worst_h,
                           (std::fabs(to_float(d.h[size_t(m) * R + r]) - sum) - step_of<T>(sum) / 2) / 0.3);
    }
  for (int b = 0; c.pooled && b < c.B; ++b)
    for (int e = 0; e < E; ++e) {
      double logit = d.sample_bias[e];
      for (int r = 0; r < R; ++r)
        for (int t = 0; t < c.T && owner[r] == e; ++t)
          logit += h[(size_t(b) * c.T + t) * R + r] * d.sample_weight[size_t(set(b * c.T)) * R + r] / c.T;
      gate[size_t(b) * E + e] = 1 / (1 + std::exp(-logit));
      worst_gate =
          std::max(worst_gate, std::fabs(gate[size_t(b) * E + e] - d.sample_gate[size_t(b) * E + e]));
    }
  for (int m = 0; m < M; ++m) {
    std::vector<double> z(R), doubt(R, 0.0);
    const std::vector<double> local = token_gates(c, d, m);
    for (int e = 0; e < E; ++e) {
      double g = d.scale[e] * gate[size_t(m / c.T) * E + e];
      if (c.mask) g *= d.gate[size_t(m % c.T) * E + e];
      if (c.token) {
        const double l = local[e];
        worst_gate = std::max(worst_gate, std::fabs(l - d.token_gate[size_t(m) * E + e]));
        g *= l;
      }
      for (int r = 0; r < R; ++r)
        if (owner[r] == e) {
          const double exact = g * h[size_t(m) * R + r], step = step_of<T>(exact);
          z[r] = rounded<T>(exact);
          if (step / 2 - std::fabs(exact - z[r]) < 1e-6 * (std::fabs(exact) + std::fabs(g))) doubt[r] = step;
        }
    }
    for (int n = 0; n < N; ++n) {
      double sum = to_float(d.bias[n]), slack = 0;
      for (int k = 0; k < K; ++k)
        sum += double(to_float(d.x[size_t(m) * K + k])) * to_float(d.w[size_t(n) * K + k]);
      for (int r = 0; r < R; ++r) {
        const double b = to_float(d.up[(size_t(set(m)) * N + n) * R + r]);
        sum += none(m) ? 0 : z[r] * b, slack += doubt[r] * std::fabs(b);
      }
      const double error = std::fabs(double(to_float(d.y[size_t(m) * N + n])) - sum);
      square += sum * sum;
      // not-a-number must not pass
      const double excess = error - step_of<T>(sum) / 2 - slack;
      worst = std::isnan(error) ? INFINITY : std::max(worst, excess);
    }
  }
  worst /= std::sqrt(square / (double(M) * N));
  bool clean = true;
  for (size_t i = 0; i < d.flags.size(); ++i) clean = clean && d.flags[i] == 0;
  std::printf("excess of y %.2e, h %.2e, gates %.2e, flags %s\n", worst, worst_h, worst_gate,
              clean ? "zero" : "LEFT");
  return worst <= 1e-6 && worst_h <= 1e-6 && worst_gate <= 1e-6 && clean ? 0 : 1;
}

template <class T>
int test(const Case& c) {
  const bool alone = c.S > 1 || c.pooled || c.assigned;
  const Sizes s{alone ? c.B : 1, alone ? c.T : c.B * c.T, c.K, c.N, c.R(), c.E(), c.token, c.pooled};
  const Way way = way_of(c.way);
  const Candidate chosen = tile_for(way, {c.warp_groups, c.columns, c.extra}, c.cluster, s);
  if (!chosen.reason.empty()) {
    std::printf("refused: %s\n", chosen.reason.c_str());
    return 2;
  }
  const Tile& tile = chosen.tile;
  const Flags flags{int(s.groups), int(tile.row_tiles)};
  const size_t shares = size_t(s.groups * tile.row_tiles) * tile.slices * c.warp_groups * c.E();
  const Tensors<T> d(c, size_t(c.B) * c.T * c.R(), shares, size_t(flags.count()));
  Params p = params_of(c, tile, s);
  p.bias = d.bias.data(), p.scale = {d.scale.data(), Kind::f32};
  p.gate = {c.mask ? d.gate.data() : nullptr, Kind::f32}, p.token_bias = {d.token_bias.data(), Kind::f32};
  p.sample_weight = {d.sample_weight.data(), Kind::f32}, p.sample_bias = {d.sample_bias.data(), Kind::f32};
  p.h = d.h.data(), p.token_gate = d.token_gate.data(), p.sample_gate = d.sample_gate.data();
  p.assignment = c.assigned ? d.assignment.data() : nullptr;
  p.z = d.z.data(), p.parts = d.parts.data(), p.flags = d.flags.data();
  const uint32_t rows = uint32_t(tile.rows() / (way == Way::cluster ? c.cluster : 1));
  const Maps maps{map3(d.x, c.K, s.span, s.groups, DEPTH, rows, 128),
                  map3(d.w, c.K, c.N, 1, DEPTH, c.columns, 128),
                  map3(d.down, c.K, c.R(), c.S, DEPTH, tile.slice, 128),
                  map3(d.token_weight, c.K, c.E(), 1, DEPTH, LOGITS, 128),
                  map3(d.up, c.R(), c.N, c.S, DEPTH, c.columns + (way == Way::persistent ? 0 : c.extra), 128),
                  map3(d.y, c.N, s.span, s.groups, 32, 64, 64)};
#ifndef MOLE_ONE_KERNEL
  if (c.warp_groups == 2)
    run<T, 2, 64, 24>(c, tile, maps, p);
  else if (c.extra == 16)
    run<T, 1, 32, 16>(c, tile, maps, p);
  else
#endif
    run<T, 1, 64, 24>(c, tile, maps, p);
  return compare(c, d);
}

}  // namespace

int main(int argc, char** argv) {
  const emu::Arguments args(argc, argv);
  Case c;
  c.way = args.text("way", "cluster");
  c.B = args.get("b", 1), c.T = args.get("t", 70), c.K = args.get("k", 72), c.N = args.get("n", 136),
  c.S = args.get("sets", 1);
  c.warp_groups = args.get("groups", 1), c.cluster = c.way == "cluster" ? args.get("cluster", 2) : 1;
  const bool narrow = args.get("narrow", 0);
  c.columns = narrow ? 32 : 64, c.extra = narrow ? 16 : 24;
  c.ranks = numbers_in(args.text("ranks", "8,16"));
  c.token = args.get("token", 1), c.pooled = args.get("pooled", 0), c.mask = args.get("mask", 0),
  c.save = args.get("save", 1);
  c.top_k = args.get("topk", 0), c.assigned = args.get("assigned", 0);
  c.seed = args.seed(), c.resident = unsigned(args.get("resident", 0));
#ifndef MOLE_ONE_KERNEL
  if (args.text("dtype", "bf16") == "fp16") return test<fp16>(c);
#endif
  return test<bf16>(c);
}

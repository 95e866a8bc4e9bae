// One dX of an sm_90 kernel in the emulator, held to float64, with dh and D that the backward's second launch
// reads.
//
//   dx way=cluster b=2 t=70 n=72 k=136 ranks=8,16 groups=1 cluster=2 token=1 topk=0 mask=0 sets=1 assigned=0
//   dtype=bf16 seed=3
//
// An element of dX may be off by half a unit of its last place, by 1e-6 of dX's typical size, and by what a
// dh or a dlogit within 1e-6 of a rounding boundary makes when it falls to the other side. dh is held to half
// a unit, D to 1e-6 of its typical size.
#include "truth.h"

namespace {

struct Case {
  std::string way;
  int B, T, K, N, S, warp_groups, columns, extra, cluster, top_k, mask;
  std::vector<int> ranks, owner;
  bool token, give_dh, give_d, assigned;
  uint64_t seed;
  unsigned resident;
  int M() const { return B * T; }
  int R() const { return int(owner.size()); }
  int E() const { return int(ranks.size()); }
  // the set of row m; with an assignment the last ones first, and none for the first sample
  int set(int m) const { return assigned ? (m / T == 0 ? -1 : S - 1 - m / T % S) : S > 1 ? m / T : 0; }
};

// the tensors of one call
template <class T>
struct Tensors {
  emu::Input<T> dy, w, down, up, token_weight, h;
  emu::Input<float> scale, gate, token_gate;
  emu::Output<T> dx;
  emu::Memory<T> dh;
  emu::Memory<float> d;
  emu::Memory<uint32_t> flags;
  emu::Input<int64_t> assignment;

  Tensors(const Case& c, int slices, size_t n_flags)
      : dy("dy", size_t(c.M()) * c.N),
        w("w", size_t(c.N) * c.K),
        down("down", size_t(c.S) * c.R() * c.K),
        up("up", size_t(c.S) * c.N * c.R()),
        token_weight("token_weight", size_t(c.E()) * c.K),
        h("h", size_t(c.M()) * c.R()),
        scale("scale", c.E()),
        gate("gate", size_t(c.M()) * c.E()),
        token_gate("token_gate", size_t(c.M()) * c.E()),
        dx("dx", size_t(c.M()) * c.K),
        dh("dh", size_t(c.M()) * c.R(), T{0x7fff}),
        d("d", size_t(slices) * c.M() * c.E(), NAN),
        flags("flags", n_flags + 1, 0),
        assignment("assignment", c.B) {
    for (int b = 0; b < c.B; ++b) assignment[b] = c.set(b * c.T);
    emu::Random random(c.seed);
    const double out = 1 / std::sqrt(double(c.N)), rank = 1 / std::sqrt(double(c.R()));
    fill(dy, random, 1), fill(w, random, out), fill(down, random, rank), fill(up, random, out),
        fill(token_weight, random, 1), fill(h, random, 1);
    fill(gate, random, 1);
    for (int e = 0; e < c.E(); ++e) scale[e] = 0.5f + float(e);
    for (int m = 0; m < c.M(); ++m) fill_gates(c, m, random);
  }

  // l of one row: anything between 0 and 1, of a softmax its k largest, normalised
  void fill_gates(const Case& c, int m, emu::Random& random) {
    float sum = 0;
    for (int e = 0; e < c.E(); ++e) {
      const float l = 0.5f + 0.5f * random.uniform();
      sum += token_gate[size_t(m) * c.E() + e] = c.top_k && (e + m) % c.E() >= c.top_k ? 0.0f : l;
    }
    for (int e = 0; e < c.E() && c.top_k; ++e) token_gate[size_t(m) * c.E() + e] /= sum;
  }

  double gamma(const Case& c, int m, int e) const {
    double g = scale[e];
    if (c.mask) g *= gate[size_t(c.mask == 1 ? m % c.T : m / c.T * c.T) * c.E() + e];
    return c.token ? g * token_gate[size_t(m) * c.E() + e] : g;
  }
};

template <class T>
Params params_of(const Case& c, const Tensors<T>& d, const Tile& t, const Sizes& s) {
  Params p{};
  p.T = c.T, p.N = c.K, p.K = c.N, p.R = c.R(), p.E = c.E();
  p.span = int32_t(s.span), p.groups = int32_t(s.groups);
  p.row_tiles = int32_t(t.row_tiles), p.column_tiles = int32_t(t.column_tiles), p.slice = t.slice,
  p.slices = t.slices, p.stages = t.stages;
  p.sets = c.S, p.top_k = c.top_k, p.token = c.token;
  p.scale = {d.scale.data(), Kind::f32}, p.gate = {c.mask ? d.gate.data() : nullptr, Kind::f32};
  // one for all samples, or one for all tokens
  p.gate_b = c.mask == 1 ? 0 : int64_t(c.T) * c.E(), p.gate_t = c.mask == 1 ? c.E() : 0, p.gate_e = 1;
  p.h = d.h.data(), p.token_gate = d.token_gate.data();
  p.dh = c.give_dh ? d.dh.data() : nullptr, p.d = c.give_d ? d.d.data() : nullptr;
  p.assignment = c.assigned ? d.assignment.data() : nullptr, p.flags = d.flags.data();
  for (int e = 0; e < c.E(); ++e) p.first[e + 1] = p.first[e] + c.ranks[e];
  return p;
}

template <class T, int GROUPS, int BN, int NX>
void run(const Case& c, const Tile& t, const Maps& maps, const Params& p) {
  emu::Launch launch;
  launch.grid = dim3(t.grid), launch.block = dim3(128 * (GROUPS + 1)), launch.cluster = dim3(t.cluster);
  launch.smem = size_t(t.shared), launch.seed = c.seed, launch.resident = c.resident;
  launch.registers = GROUPS == 1 ? 240 : 168;
  if (t.way == Way::persistent)
    emu::launch(launch, [&] { persistent_kernel<T, GROUPS, BN, NX, true>(maps, p); });
  else if (t.way == Way::cluster)
    emu::launch(launch, [&] { tile_kernel<T, GROUPS, BN, NX, true, true>(maps, p); });
  else
    emu::launch(launch, [&] { tile_kernel<T, GROUPS, BN, NX, false, true>(maps, p); });
}

// what a kernel rounds before it multiplies by it, and the step it may be off by where it lies within `close`
// of a boundary
template <class T>
struct Factor {
  double value, doubt;
  Factor(double exact, double close) : value(rounded<T>(exact)), doubt(0) {
    if (step_of<T>(exact) / 2 - std::fabs(exact - value) < close) doubt = step_of<T>(exact);
  }
};

// the largest error of each output, over its typical size
struct Worst {
  double dx = 0, dh = 0, d = 0, dx_square = 0, d_square = 0, d_count = 0;
};

double past(double worst, double error, double allowed) {
  return std::isnan(error) ? INFINITY : std::max(worst, error - allowed);
}

template <class T>
void compare_row(const Case& c, const Tensors<T>& t, int m, int slices, Worst& worst) {
  const int K = c.K, N = c.N, R = c.R(), E = c.E(), set = std::max(0, c.set(m));
  const bool none = c.set(m) < 0;
  std::vector<double> d(E, 0.0), close(E, 0.0);
  std::vector<Factor<T>> dh, dlogit;
  for (int r = 0; r < R; ++r) {
    double v = 0;
    for (int n = 0; n < N && !none; ++n)
      v += double(to_float(t.dy[size_t(m) * N + n])) * to_float(t.up[(size_t(set) * N + n) * R + r]);
    const double g = t.gamma(c, m, c.owner[r]), h = to_float(t.h[size_t(m) * R + r]);
    d[c.owner[r]] += v * h, close[c.owner[r]] += 1e-6 * (std::fabs(v) + 0.3) * std::fabs(h);
    dh.emplace_back(g * v, 1e-6 * (std::fabs(g * v) + std::fabs(g)));
    if (c.give_dh)
      worst.dh = past(worst.dh, std::fabs(to_float(t.dh[size_t(m) * R + r]) - g * v), step_of<T>(g * v) / 2);
  }
  double all = 0, doubt = 0;
  for (int e = 0; e < E; ++e) {
    double sum = 0;
    for (int j = 0; j < slices; ++j) sum += t.d[(size_t(j) * c.M() + m) * E + e];
    if (c.give_d) worst.d = past(worst.d, std::fabs(sum - d[e]), 0);
    // rows without a set say nothing of D's typical size
    worst.d_square += d[e] * d[e], worst.d_count += !none;
    all += t.gamma(c, m, e) * d[e],
        doubt += std::fabs(t.gamma(c, m, e)) * (close[e] + 1e-6 * std::fabs(d[e]));
  }
  for (int e = 0; e < E && c.token; ++e) {
    const double gd = t.gamma(c, m, e) * d[e], l = t.token_gate[size_t(m) * E + e];
    const double own = std::fabs(t.gamma(c, m, e)) * (close[e] + 1e-6 * std::fabs(d[e]));
    dlogit.emplace_back(gd - l * (c.top_k ? all : gd), c.top_k ? own + l * doubt : own);
  }
  for (int k = 0; k < K; ++k) {
    double sum = 0, slack = 0;
    for (int n = 0; n < N; ++n)
      sum += double(to_float(t.dy[size_t(m) * N + n])) * to_float(t.w[size_t(n) * K + k]);
    for (int r = 0; r < R && !none; ++r) {
      const double a = to_float(t.down[(size_t(set) * R + r) * K + k]);
      sum += dh[r].value * a, slack += dh[r].doubt * std::fabs(a);
    }
    for (int e = 0; e < E && c.token; ++e) {
      const double f = to_float(t.token_weight[size_t(e) * K + k]);
      sum += dlogit[e].value * f, slack += dlogit[e].doubt * std::fabs(f);
    }
    worst.dx_square += sum * sum;
    worst.dx = past(worst.dx, std::fabs(double(to_float(t.dx[size_t(m) * K + k])) - sum),
                    step_of<T>(sum) / 2 + slack);
  }
}

template <class T>
int compare(const Case& c, const Tensors<T>& t, int slices) {
  Worst worst;
  for (int m = 0; m < c.M(); ++m) compare_row(c, t, m, slices, worst);
  worst.dx /= std::sqrt(worst.dx_square / (double(c.M()) * c.K));
  // V is about a third, times gates up to the number of experts
  worst.dh /= 0.3 * c.E();
  if (worst.d_count > 0) worst.d /= std::sqrt(worst.d_square / worst.d_count);
  bool clean = true;
  for (size_t i = 0; i < t.flags.size(); ++i) clean = clean && t.flags[i] == 0;
  std::printf("excess of dx %.2e, dh %.2e, d %.2e, flags %s\n", worst.dx, worst.dh, worst.d,
              clean ? "zero" : "LEFT");
  return worst.dx <= 1e-6 && worst.dh <= 1e-6 && worst.d <= 1e-6 && clean ? 0 : 1;
}

template <class T>
int test(const Case& c) {
  const bool alone = c.S > 1 || c.assigned;
  const Sizes s{alone ? c.B : 1, alone ? c.T : c.M(), c.N, c.K, c.R(), c.E(), c.token, false, true};
  const Way way = way_of(c.way);
  const Candidate chosen = tile_for(way, {c.warp_groups, c.columns, c.extra}, c.cluster, s);
  if (!chosen.reason.empty()) {
    std::printf("refused: %s\n", chosen.reason.c_str());
    return 2;
  }
  const Tile& tile = chosen.tile;
  const Tensors<T> d(c, tile.slices, size_t(Flags{int(s.groups), int(tile.row_tiles)}.count()));
  const uint32_t rows = uint32_t(tile.rows() / (way == Way::cluster ? c.cluster : 1));
  const Maps maps{map3(d.dy, c.N, s.span, s.groups, DEPTH, rows, 128),
                  map3(d.w, c.K, c.N, 1, BOX, DEPTH, 64),
                  map3(d.up, c.R(), c.N, c.S, BOX, DEPTH, 64),
                  map3(d.token_weight, c.K, c.E(), 1, BOX, LOGIT_DEPTH, 64),
                  map3(d.down, c.K, c.R(), c.S, BOX, DEPTH, 64),
                  map3(d.dx, c.K, s.span, s.groups, 32, 64, 64)};
  const Params p = params_of(c, d, tile, s);
#ifndef MOLE_ONE_KERNEL
  if (c.warp_groups == 2)
    run<T, 2, 64, 24>(c, tile, maps, p);
  else if (c.extra == 16)
    run<T, 1, 32, 16>(c, tile, maps, p);
  else if (c.extra == 40)
    run<T, 1, 64, 40>(c, tile, maps, p);
  else
#endif
    run<T, 1, 64, 24>(c, tile, maps, p);
  return compare(c, d, tile.slices);
}

}  // namespace

int main(int argc, char** argv) {
  const emu::Arguments args(argc, argv);
  Case c;
  c.way = args.text("way", "cluster");
  c.B = args.get("b", 1), c.T = args.get("t", 70), c.K = args.get("k", 136), c.N = args.get("n", 72),
  c.S = args.get("sets", 1);
  c.warp_groups = args.get("groups", 1), c.cluster = c.way == "cluster" ? args.get("cluster", 2) : 1;
  c.columns = args.get("narrow", 0) ? 32 : 64, c.extra = args.get("narrow", 0) ? 16
                                                         : args.get("wide", 0) ? 40
                                                                               : 24;
  c.ranks = numbers_in(args.text("ranks", "8,16"));
  for (int e = 0; e < c.E(); ++e) c.owner.insert(c.owner.end(), c.ranks[e], e);
  c.token = args.get("token", 1), c.mask = args.get("mask", 0), c.top_k = args.get("topk", 0),
  c.assigned = args.get("assigned", 0);
  c.give_dh = args.get("dh", 1), c.give_d = args.get("d", 1);
  c.seed = args.seed(), c.resident = unsigned(args.get("resident", 0));
#ifndef MOLE_ONE_KERNEL
  if (args.text("dtype", "bf16") == "fp16") return test<fp16>(c);
#endif
  return test<bf16>(c);
}

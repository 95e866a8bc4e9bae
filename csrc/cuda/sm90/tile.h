// Which tile computes a call: every candidate with its predicted time or the reason why it cannot. Pure
// functions of sizes; no CUDA here.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "problem.h"

namespace mole::sm90 {

enum class Way : int32_t { cluster, persistent, recompute };

inline const char* name_of(Way way) {
  return way == Way::cluster ? "cluster" : way == Way::persistent ? "persistent" : "recompute";
}

// what kernels there are: warp groups (64 rows each), columns of y, columns of h and logits.
// 160 columns make 2048×1280 one wave of 128 tiles; narrow h for small ranks, wide for few slices of large
// ones
// clang-format off: one list of tiles each
#define MOLE_SM90_CLUSTER(X)                                                                        \
  X(2, 128, 16)                                                                                     \
  X(2, 128, 24) X(2, 128, 40) X(2, 128, 72) X(2, 160, 16) X(2, 160, 24) X(2, 160, 40) X(2, 160, 72) \
      X(2, 192, 16) X(2, 192, 24) X(2, 192, 40) X(1, 128, 16) X(1, 128, 32) X(1, 128, 40) X(1, 128, 72)
#define MOLE_SM90_PERSISTENT(X)                                                                         \
  X(2, 128, 40)                                                                                         \
  X(2, 128, 136) X(2, 160, 40) X(2, 160, 136) X(2, 192, 40) X(2, 192, 136) X(2, 256, 40) X(2, 256, 136) \
      X(1, 128, 40) X(1, 128, 136)
#define MOLE_SM90_RECOMPUTE(X) \
  X(2, 128, 24)                \
  X(2, 128, 40) X(2, 160, 24) X(2, 160, 40) X(2, 192, 24) X(2, 192, 40) X(1, 128, 24) X(1, 128, 40)
// dX: columns of dX, columns of V; no logits ride along
#define MOLE_SM90_CLUSTER_DX(X)                                                                     \
  X(2, 128, 16)                                                                                     \
  X(2, 128, 32) X(2, 160, 16) X(2, 160, 32) X(2, 160, 64) X(2, 192, 16) X(2, 192, 32) X(1, 128, 16) \
      X(1, 128, 32)
#define MOLE_SM90_PERSISTENT_DX(X) \
  X(2, 128, 128)                   \
  X(2, 160, 32) X(2, 160, 128) X(2, 192, 128) X(2, 256, 32) X(2, 256, 128) X(1, 128, 32) X(1, 128, 128)
#define MOLE_SM90_RECOMPUTE_DX(X) \
  X(2, 128, 16) X(2, 128, 32) X(2, 160, 16) X(2, 160, 32) X(2, 192, 16) X(2, 192, 32) X(1, 128, 32)
// clang-format on

struct Shape {
  int warp_groups, columns, extra;
};

inline std::vector<Shape> shapes_of(Way way, bool back = false) {
#define MOLE_SHAPE(groups, columns, extra) {groups, columns, extra},
  static const std::vector<Shape> cluster{MOLE_SM90_CLUSTER(MOLE_SHAPE)},
      persistent{MOLE_SM90_PERSISTENT(MOLE_SHAPE)}, recompute{MOLE_SM90_RECOMPUTE(MOLE_SHAPE)},
      cluster_dx{MOLE_SM90_CLUSTER_DX(MOLE_SHAPE)}, persistent_dx{MOLE_SM90_PERSISTENT_DX(MOLE_SHAPE)},
      recompute_dx{MOLE_SM90_RECOMPUTE_DX(MOLE_SHAPE)};
#undef MOLE_SHAPE
  if (back) return way == Way::cluster ? cluster_dx : way == Way::persistent ? persistent_dx : recompute_dx;
  return way == Way::cluster ? cluster : way == Way::persistent ? persistent : recompute;
}

// groups, span: row tiles do not straddle `groups` groups of `span` rows. back: dX, K and N in its own roles
// (K is summed over)
struct Sizes {
  int64_t groups, span;
  int64_t K, N, R, E;
  bool token, pooled;
  bool back = false;
};

// one GPU. clusters[c]: how many clusters of c CTAs with all of a multiprocessor's shared memory are resident
// at once
struct Card {
  int processors = 132;
  int shared = 232448;
  int clusters[9] = {0, 132, 66, 0, 32, 0, 0, 0, 16};
};

struct Tile {
  Way way;
  Shape shape;
  int cluster, slice, slices, stages, shared, grid;
  int64_t row_tiles, column_tiles;
  bool back;
  int parts;  // shares of D of one row that lie in shared memory
  int rows() const { return 64 * shape.warp_groups; }
};

// reason: why it cannot be, empty where it can. us: predicted microseconds of the whole launch
struct Candidate {
  Tile tile;
  double us;
  std::string reason;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// part of the tensor cores' rate that a main loop with tiles of this size reaches; published products on an
// H100
inline double tile_rate(int rows, int columns) {
  const int area = rows * columns;
  return area >= 32768   ? 1.0
         : area >= 24576 ? 0.97
         : area >= 20480 ? 0.95
         : area >= 16384 ? 0.9
         : area >= 8192  ? 0.7
                         : 0.5;
}

// microseconds of `macs` multiply-adds on one multiprocessor: 0.8 of 989.4 TFLOP/s over 132, what a library's
// large product reaches
inline double product_us(double macs, double rate) { return 2 * macs / (989.4e6 * 0.8 / 132 * rate); }

inline Shared layout_of(const Tile& t, int stages) {
  const bool stacked = t.way != Way::persistent;
  const int extra = t.back ? boxed(t.shape.extra) : t.shape.extra;
  const int loaded = stacked ? t.shape.columns + extra : std::max(t.shape.columns, extra);
  return shared_layout(t.rows(), t.shape.columns, loaded, stages,
                       t.way == Way::cluster ? t.slices * t.slice : 0, t.shape.extra,
                       t.slices * t.slice + LOGITS, t.parts);
}

// as many stages as shared memory holds, at most 6: more hide no latency that is left
inline void add_stages(Tile& t, const Card& card) {
  for (t.stages = 6; t.stages > 0; --t.stages) {
    t.shared = layout_of(t, t.stages).total;
    if (t.shared <= card.shared) return;
  }
}

// launch and first loads, last stores; what a hand-over costs: estimates from the latency of the second-level
// cache
constexpr double RAMP_US = 3.0, EXCHANGE_US = 0.6, FLAG_US = 0.8, TICKET_US = 0.7, SAMPLE_US = 1.0;

inline double tile_us(const Tile& t, const Sizes& s) {
  const double rows = t.rows(), columns = t.shape.columns,
               extra = t.way == Way::persistent ? 0 : t.shape.extra;
  const double inner = s.R + (s.back && s.token ? LOGIT_DEPTH : 0);
  return product_us(rows * ((columns + extra) * s.K + columns * inner), tile_rate(t.rows(), t.shape.columns));
}

inline double predict(const Tile& t, const Sizes& s, const Card& card) {
  const int64_t row_tiles = s.groups * t.row_tiles;
  if (t.way == Way::persistent) {
    const double h = product_us(double(t.rows()) * t.shape.extra * s.K,
                                std::max(0.35, tile_rate(t.rows(), t.shape.extra)));
    const int64_t n_h = row_tiles * t.slices, n_y = row_tiles * t.column_tiles, p = card.processors;
    // those that made one h more get no tile of the ragged last wave
    const double rounds = double(n_h / p), late = double(n_h % p > 0), waves = double(n_y / p);
    const bool spared = n_y % p <= p - n_h % p;
    const double y = tile_us(t, s);
    const double span =
        spared ? std::max(rounds * h + (waves + (n_y % p > 0)) * y, (rounds + late) * h + waves * y)
               : (rounds + late) * h + (waves + 1) * y;
    return RAMP_US + span + FLAG_US + TICKET_US + (s.pooled ? SAMPLE_US : 0);
  }
  const int64_t clusters = row_tiles * ceil_div(t.column_tiles, t.cluster);
  const double waves = double(ceil_div(clusters, std::max(1, card.clusters[t.cluster])));
  return RAMP_US + waves * tile_us(t, s) + (t.cluster > 1 ? EXCHANGE_US : 0) + (s.pooled ? SAMPLE_US : 0);
}

inline Candidate consider(Way way, Shape shape, int cluster, const Sizes& s, const Card& card) {
  Tile t{way, shape, cluster, shape.extra - (s.token && !s.back ? LOGITS : 0), 1, 0, 0, 0, 0, 0, s.back, 0};
  t.row_tiles = ceil_div(s.span, t.rows());
  t.column_tiles = ceil_div(s.N, shape.columns);
  t.slices = way == Way::cluster ? cluster : int(ceil_div(s.R, t.slice));
  t.parts = s.back && s.token && way != Way::persistent ? cluster * int(s.E) : 0;
  const auto no = [&](std::string reason) { return Candidate{t, 0, std::move(reason)}; };
  if (way != Way::persistent && int64_t(t.slices) * t.slice < s.R)
    return no(std::to_string(t.slices * t.slice) + " columns of h are fewer than R = " + std::to_string(s.R));
  if (way == Way::recompute && t.slices > 1) return no("all of h must fit beside y");
  if (way == Way::cluster && t.column_tiles < cluster)
    return no("fewer tiles of columns than CTAs in the cluster");
  if (way == Way::cluster && card.clusters[cluster] == 0)
    return no("no such cluster is resident on this GPU");
  add_stages(t, card);
  if (t.stages < 3) return no("shared memory holds fewer than three stages");
  const int64_t row_tiles = s.groups * t.row_tiles;
  const int64_t clusters = row_tiles * ceil_div(t.column_tiles, cluster);
  // a cluster that waits for a sample's gate waits for all of the sample's tiles: they must be running
  if (way == Way::cluster && s.pooled && clusters > card.clusters[cluster])
    return no("the sample gate needs all tiles resident, " + std::to_string(clusters) + " clusters are not");
  const int64_t most = way == Way::persistent ? card.processors : int64_t(card.clusters[cluster]) * cluster;
  const int64_t wanted =
      way == Way::persistent ? row_tiles * (t.column_tiles + t.slices) : clusters * cluster;
  t.grid = int(std::min(most, wanted));
  return {t, predict(t, s, card), ""};
}

// why no tile of this way can be, whatever its size; empty where one may
inline std::string refusal(Way way, const Sizes& s) {
  const auto needs8 = [](const char* what, int64_t n) {
    return std::string(what) + " = " + std::to_string(n) + " is no multiple of 8 (TMA)";
  };
  // by the names of the layer
  if (s.K % 8) return needs8(s.back ? "N" : "K", s.K);
  if (s.N % 8) return needs8(s.back ? "K" : "N", s.N);
  if (s.R % 8) return needs8("R", s.R);
  if (s.E > (s.token ? LOGITS : MOST_EXPERTS))
    return std::to_string(s.E) + " experts are more than the kernel's columns for their gates";
  if (s.back && s.pooled)
    return "the sample gate's gradient needs every token of a sample before the first dX";
  if (way == Way::recompute && s.pooled)
    return "the sample gate needs every token of a sample before the first output";
  return "";
}

// all of them, refused ones too
inline std::vector<Candidate> candidates(Way way, const Sizes& s, const Card& card) {
  std::vector<Candidate> all;
  for (const Shape& shape : shapes_of(way, s.back)) {
    if (way != Way::cluster) all.push_back(consider(way, shape, 1, s, card));
    for (int c = 2; way == Way::cluster && c <= 8; c *= 2) all.push_back(consider(way, shape, c, s, card));
  }
  return all;
}

// the fastest by prediction; a candidate with a reason where none can be
inline Candidate choose(Way way, const Sizes& s, const Card& card) {
  const std::string never = refusal(way, s);
  const std::vector<Candidate> all = candidates(way, s, card);
  if (!never.empty()) return {all.front().tile, 0, never};
  const Candidate* best = nullptr;
  for (const Candidate& c : all)
    if (c.reason.empty() && (!best || c.us < best->us)) best = &c;
  if (best) return *best;
  return {all.front().tile, 0, std::string("no tile fits: ") + all.front().reason};
}

}  // namespace mole::sm90

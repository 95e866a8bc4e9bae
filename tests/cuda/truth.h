// What the programs that hold an sm_90 kernel to float64 share: rounding, inputs, tensor maps, the tile of a
// case.
#pragma once

#include <cmath>
#include <cstdio>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "../../csrc/emulator/emulator.h"
//
#include "../../csrc/cuda/sm90/persistent_kernel.h"
#include "../../csrc/cuda/sm90/tile.h"

using namespace mole;
using namespace mole::sm90;

namespace {

template <class T>
double step_of(double v) {
  const int bits = std::is_same_v<T, bf16> ? 8 : 11, smallest = std::is_same_v<T, bf16> ? -126 : -14;
  int exponent;
  std::frexp(v, &exponent);
  return std::ldexp(1.0, std::max(exponent - 1, smallest) - bits + 1);
}

template <class T>
double rounded(double v) {
  return v == 0 ? 0 : std::nearbyint(v / step_of<T>(v)) * step_of<T>(v);
}

template <class T>
void fill(const emu::Array<T>& a, emu::Random& random, double scale) {
  for (size_t i = 0; i < a.size(); ++i) a[i] = from_float<T>(float(random.uniform() * scale));
}

void fill(const emu::Array<float>& a, emu::Random& random, double scale) {
  for (size_t i = 0; i < a.size(); ++i) a[i] = float(random.uniform() * scale);
}

template <class T>
CUtensorMap map3(const emu::Array<T>& a,
                 uint64_t columns,
                 uint64_t rows,
                 uint64_t slabs,
                 uint32_t box_columns,
                 uint32_t box_rows,
                 int swizzle) {
  return emu::tensor_map_3d(a.data(), {columns, rows, slabs}, {columns * 2, rows * columns * 2},
                            {box_columns, box_rows, 1}, swizzle);
}

inline Way way_of(const std::string& name) {
  return name == "cluster" ? Way::cluster : name == "persistent" ? Way::persistent : Way::recompute;
}

// the tile, with few stages, so that slots come round again at small K; a reason where there is none
inline Candidate tile_for(Way way, Shape shape, int cluster, const Sizes& s) {
  Card card;
  card.processors = 4, card.clusters[1] = 4, card.clusters[2] = s.pooled ? 64 : 2,
  card.clusters[4] = s.pooled ? 64 : 1;
  Candidate chosen = consider(way, shape, cluster, s, card);
  if (const std::string never = refusal(way, s); !never.empty()) chosen.reason = never + chosen.reason;
  chosen.tile.stages = 3, chosen.tile.shared = layout_of(chosen.tile, 3).total;
  return chosen;
}

inline std::vector<int> numbers_in(const std::string& text) {
  std::vector<int> all;
  std::stringstream list(text);
  for (std::string r; std::getline(list, r, ',');) all.push_back(std::stoi(r));
  return all;
}

}  // namespace

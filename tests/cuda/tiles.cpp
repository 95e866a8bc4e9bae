// The tile choice by itself, for tests: lines of "way B T K N R E S token pooled back" in, for each the plan
// or the reason out.
#include <cstdio>
#include <iostream>
#include <utility>

#include "../../csrc/cuda/sm90/tile.h"

using namespace mole::sm90;

int main(int argc, char**) {
  std::string name;
  int64_t B, T, S;
  Sizes s;
  while (std::cin >> name >> B >> T >> s.K >> s.N >> s.R >> s.E >> S >> s.token >> s.pooled >> s.back) {
    if (s.back) std::swap(s.K, s.N);
    const bool alone = S > 1 || s.pooled;
    s.groups = alone ? B : 1, s.span = alone ? T : B * T;
    const Way way = name == "cluster"      ? Way::cluster
                    : name == "persistent" ? Way::persistent
                                           : Way::recompute;
    // with any argument: every candidate
    std::vector<Candidate> all =
        argc > 1 ? candidates(way, s, Card{}) : std::vector<Candidate>{choose(way, s, Card{})};
    for (const Candidate& c : all) {
      const Tile& t = c.tile;
      if (!c.reason.empty())
        std::printf("no\t%s\n", c.reason.c_str());
      else
        std::printf("yes\t%d %d %d %d %d %d %d %d %d %.6f\n", t.shape.warp_groups, t.shape.columns,
                    t.shape.extra, t.cluster, t.slice, t.slices, t.stages, t.shared, t.grid, c.us);
    }
    std::printf("end\n");
  }
}

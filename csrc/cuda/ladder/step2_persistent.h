// Step 2 changes the grid: as many CTAs as multiprocessors, each of which takes tile after tile. The producer
// loads the next tile's first stages while the consumers still store, and eight row tiles in a row share
// their columns of W in the second-level cache.
#pragma once

#include "step1_plain.h"

namespace mole::sm90::ladder {

constexpr int TALL = 8;

struct Place {
  int m0, n0;
};

// tile i -> where it lies: TALL row tiles for each column tile, then the next column
template <int BM, int BN>
MOLE_DEVICE Place place_of(const Params& p, int i) {
  const int width = TALL * p.column_tiles, top = i / width * TALL;
  const int height = p.row_tiles - top < TALL ? p.row_tiles - top : TALL;
  return {(top + i % width % height) * BM, i % width / height * BN};
}

template <class T, int GROUPS, int BN>
MOLE_DEVICE void persistent(const Maps& maps, const Params& p) {
  constexpr int BM = 64 * GROUPS;
  unsigned char* smem = dynamic_smem();
  const Stages<false> stages{smem, (BM + BN) * ROW_BYTES, BM * ROW_BYTES, p.stages};
  Barriers& bars = *reinterpret_cast<Barriers*>(smem + p.stages * stages.bytes);
  start_ring<GROUPS>(bars, p.stages);
  const int thread = int(threadIdx.x), tiles = p.row_tiles * p.column_tiles;
  Ring ring;
  if (thread < 128) {
    registers_decrease<40>();
    for (int i = int(blockIdx.x); thread == 0 && i < tiles; i += int(gridDim.x)) {
      const Place at = place_of<BM, BN>(p, i);
      load_steps<BM, BN>(maps, p, stages, smem, bars, ring, at.m0, at.n0);
    }
  } else {
    registers_increase<GROUPS == 1 ? 240 : 232>();
    const Lane me(thread - 128);
    for (int i = int(blockIdx.x); i < tiles; i += int(gridDim.x)) {
      const Place at = place_of<BM, BN>(p, i);
      float y[BN / 2];
      base_product<T, false>(y, stages, (p.K + DEPTH - 1) / DEPTH, ring, bars, me, 1);
      store_registers<T>(y, p, at.m0, at.n0, fresh(me));
    }
  }
}

}  // namespace mole::sm90::ladder

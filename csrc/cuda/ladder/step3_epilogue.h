// Step 3 changes the way out: bias added, y rounded into shared memory (swizzled, without bank conflicts) and
// stored by TMA, which cuts what reaches over y's edge and goes on while the consumers multiply the next
// tile. Step 4 adds z Bᵀ for a z [M,R] that is given: R more columns of the same main loop, z's tile in x's
// place and B's in W's.
#pragma once

#include "step2_persistent.h"

namespace mole::sm90::ladder {

// the stages of the rank columns; maps.down is z [1,M,R]
template <int BM, int BN>
MOLE_DEVICE void load_rank_steps(const Maps& maps,
                                 const Params& p,
                                 const Stages<false>& stages,
                                 unsigned char* smem,
                                 Barriers& bars,
                                 Ring& ring,
                                 const Place& at) {
  for (int r = 0; r < p.R; r += DEPTH) {
    mbarrier_wait(&bars.empty[ring.slot], ring.phase ^ 1);
    uint64_t* full = &bars.full[ring.slot];
    mbarrier_arrive_expect_tx(full, (BM + BN) * ROW_BYTES);
    unsigned char* stage = smem + ring.slot * stages.bytes;
    tma_load_3d(stage, &maps.down, full, r, at.m0, 0);
    tma_load_3d(stage + BM * ROW_BYTES, &maps.up, full, r, at.n0, 0);
    ring.advance(p.stages);
  }
}

// y = x Wᵀ + bias, and + z upᵀ where R > 0: the expand is nothing but more steps of K
template <class T, int GROUPS, int BN>
MOLE_DEVICE void epilogue(const Maps& maps, const Params& p) {
  constexpr int BM = 64 * GROUPS;
  unsigned char* smem = dynamic_smem();
  const Stages<false> stages{smem, (BM + BN) * ROW_BYTES, BM * ROW_BYTES, p.stages};
  unsigned char* staging = smem + p.stages * stages.bytes;
  Barriers& bars = *reinterpret_cast<Barriers*>(staging + BM * BN * 2);
  start_ring<GROUPS>(bars, p.stages);
  const int thread = int(threadIdx.x), tiles = p.row_tiles * p.column_tiles;
  Ring ring;
  if (thread < 128) {
    registers_decrease<40>();
    for (int i = int(blockIdx.x); thread == 0 && i < tiles; i += int(gridDim.x)) {
      const Place at = place_of<BM, BN>(p, i);
      load_steps<BM, BN>(maps, p, stages, smem, bars, ring, at.m0, at.n0);
      load_rank_steps<BM, BN>(maps, p, stages, smem, bars, ring, at);
    }
  } else {
    registers_increase<GROUPS == 1 ? 240 : 232>();
    const Lane me(thread - 128);
    const int steps = (p.K + DEPTH - 1) / DEPTH + (p.R + DEPTH - 1) / DEPTH;
    for (int i = int(blockIdx.x); i < tiles; i += int(gridDim.x)) {
      const Place at = place_of<BM, BN>(p, i);
      float y[BN / 2];
      base_product<T, false>(y, stages, steps, ring, bars, me, 1);
      store_tile<T>(y, staging, &maps.y, p, at.n0, at.m0 + 64 * me.group, 0, fresh(me));
    }
    if (me.warp == 0 && me.lane == 0) bulk_wait<0>();
  }
}

}  // namespace mole::sm90::ladder

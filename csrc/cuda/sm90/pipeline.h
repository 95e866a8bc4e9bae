// The ring of stages between the producer warp and the consumer warp groups, and the products that run on it.
#pragma once

#include "../device/cluster.h"
#include "../device/mbarrier.h"
#include "../device/memory.h"
#include "../device/thread.h"
#include "../device/tma.h"
#include "../device/types.h"
#include "../device/wgmma.h"
#include "problem.h"

namespace mole::sm90 {

// element i of an operand of any dtype
MOLE_DEVICE float number(const Numbers& of, int64_t i) {
  if (of.kind == Kind::f32) return static_cast<const float*>(of.at)[i];
  if (of.kind == Kind::bf16) return to_float(static_cast<const bf16*>(of.at)[i]);
  return to_float(static_cast<const fp16*>(of.at)[i]);
}

// the set of a group; outside 0 … S−1 there is none: TMA then loads zeros for A and B, and nothing is added
// to the base
MOLE_DEVICE int set_of(const Params& p, int group) {
  if (p.assignment) return int(p.assignment[group]);
  return p.sets > 1 ? group : 0;
}

// barriers of one CTA, in shared memory
struct Barriers {
  uint64_t full[8], empty[8];     // of each stage
  uint64_t z_full[2], z_free[2];  // of each warp group's rows of z (cluster)
  uint64_t item_full[2], item_free[2];
  int32_t item[2];  // what to do next, from the producer (persistent)
};
static_assert(sizeof(Barriers) <= 256);

// which stage is next, and the parity of its barriers' phase
struct Ring {
  int slot = 0;
  uint32_t phase = 0;
  MOLE_HOST_DEVICE void advance(int slots) {
    if (++slot == slots) slot = 0, phase ^= 1;
  }
};

// a thread's place in its warp group: accumulator i of m64nN lies at (row(i), column(i)) of the group's 64
// rows
struct Lane {
  int group, warp, lane;
  MOLE_HOST_DEVICE explicit Lane(int thread)
      : group(thread / 128), warp(thread / 32 % 4), lane(thread % 32) {}
  MOLE_HOST_DEVICE int row(int i) const { return warp * 16 + lane / 4 + 8 * ((i >> 1) & 1); }
  MOLE_HOST_DEVICE int column(int i) const { return (i >> 2) * 8 + (lane % 4) * 2 + (i & 1); }
};

// the same lane, as far as the compiler knows a new one: what is derived from it is computed where it is
// used, not kept in registers through the main loop
MOLE_DEVICE Lane fresh(Lane me) {
#ifndef MOLE_EMULATE
  asm volatile("" : "+r"(me.lane), "+r"(me.warp), "+r"(me.group));
#endif
  return me;
}

// every warp says for itself that it has read a stage; in a cluster to every CTA whose producer writes into
// it
template <bool CLUSTER>
MOLE_DEVICE void release_stage(uint64_t* empty, const Lane& me, int cluster) {
  if constexpr (CLUSTER) {
    if (me.lane < cluster) mbarrier_arrive_freed(empty, me.lane);
  } else {
    if (me.lane == 0) mbarrier_arrive(empty);
  }
}

template <bool CLUSTER>
MOLE_DEVICE void wait_stage(uint64_t* empty, uint32_t parity) {
  if constexpr (CLUSTER)
    mbarrier_wait_freed(empty, parity);
  else
    mbarrier_wait(empty, parity);
}

// The tiles of W, A and B, each the right operand of a product over the rows of a stage. Forward: K-major, a
// row of 128 bytes for each output. Backward: output-major, boxes of 32 outputs, in each a row of 64 bytes
// for every index summed over (64-byte swizzle; 160 columns are five boxes where the 128-byte swizzle would
// want three of 64)
template <bool BACK>
MOLE_DEVICE uint64_t right_operand(const void* p, int depth) {
  if constexpr (BACK) return wgmma_descriptor<Swizzle::B64>(p, depth * BOX * 2, 8 * BOX * 2);
  return wgmma_descriptor_k128(p);
}

// bytes from 16 of what is summed over to the next
template <bool BACK>
constexpr int RIGHT_STEP = BACK ? 16 * BOX * 2 : 32;

template <bool BACK>
constexpr Major RIGHT_MAJOR = BACK ? Major::MN : Major::K;

// one tile of W, A or B: `depth` of what is summed over from `inner` on, `columns` outputs (backward) from
// `outer` on
template <bool BACK>
MOLE_DEVICE void load_right(unsigned char* at,
                            const CUtensorMap* map,
                            uint64_t* full,
                            int inner,
                            int outer,
                            int slab,
                            int columns = 0,
                            int depth = DEPTH) {
  if constexpr (BACK) {
    for (int c = 0; c < columns; c += BOX) tma_load_3d(at + c * depth * 2, map, full, outer + c, inner, slab);
  } else {
    tma_load_3d(at, map, full, inner, outer, slab);
  }
}

// where the stages lie: `x_bytes` of x's tile first, then the tile of W
template <bool BACK>
struct Stages {
  const unsigned char* at;
  int bytes, x_bytes, count;
};

// acc [64,N] (+)= this warp group's rows of x times the rows of W in one stage, as a group of wgmma in flight
template <class T, int REGS, bool BACK>
MOLE_DEVICE void multiply_stage(float (&acc)[REGS],
                                const Stages<BACK>& stages,
                                const Ring& ring,
                                Barriers& bars,
                                const Lane& me,
                                bool add) {
  mbarrier_wait(&bars.full[ring.slot], ring.phase);
  const unsigned char* stage = stages.at + ring.slot * stages.bytes;
  const uint64_t x = wgmma_descriptor_k128(stage + me.group * 64 * ROW_BYTES),
                 w = right_operand<BACK>(stage + stages.x_bytes, DEPTH);
  wgmma_fence();
#pragma unroll
  for (int kk = 0; kk < DEPTH / 16; ++kk)
    wgmma<T, Major::K, RIGHT_MAJOR<BACK>>(acc, wgmma_advance(x, kk * 32),
                                          wgmma_advance(w, kk * RIGHT_STEP<BACK>), add || kk > 0);
  wgmma_commit();
}

// acc [64,N] = x_tile · (rows of W)ᵀ over `steps` ≥ 1 stages; a stage is released while the next is being
// multiplied. The first step stands before the loop: with a branch inside, ptxas would run the products one
// after another.
template <class T, bool CLUSTER, int REGS, bool BACK>
MOLE_DEVICE void base_product(float (&acc)[REGS],
                              const Stages<BACK>& stages,
                              int steps,
                              Ring& ring,
                              Barriers& bars,
                              const Lane& me,
                              int cluster) {
  wgmma_hold(acc);
  multiply_stage<T>(acc, stages, ring, bars, me, false);
  int previous = ring.slot;
  ring.advance(stages.count);
  for (int k = 1; k < steps; ++k) {
    multiply_stage<T>(acc, stages, ring, bars, me, true);
    wgmma_wait<1>();
    release_stage<CLUSTER>(&bars.empty[previous], me, cluster);
    previous = ring.slot;
    ring.advance(stages.count);
  }
  wgmma_wait<0>();
  wgmma_hold(acc);
  release_stage<CLUSTER>(&bars.empty[previous], me, cluster);
}

// acc [64,N] += 16·STEPS columns of z, A operands in registers, times the same columns of B in the next stage
template <class T, bool CLUSTER, int STEPS, int REGS, bool BACK>
MOLE_DEVICE void expand_step(float (&acc)[REGS],
                             const uint32_t (&a)[STEPS][4],
                             const Stages<BACK>& stages,
                             Ring& ring,
                             Barriers& bars,
                             const Lane& me,
                             int cluster) {
  mbarrier_wait(&bars.full[ring.slot], ring.phase);
  const uint64_t up = right_operand<BACK>(stages.at + ring.slot * stages.bytes + stages.x_bytes, 16 * STEPS);
  wgmma_fence(acc);
#pragma unroll
  for (int kk = 0; kk < STEPS; ++kk)
    wgmma<T, RIGHT_MAJOR<BACK>>(acc, a[kk], wgmma_advance(up, kk * RIGHT_STEP<BACK>));
  wgmma_commit();
  wgmma_wait<0>();
  wgmma_hold(acc);
  release_stage<CLUSTER>(&bars.empty[ring.slot], me, cluster);
  ring.advance(stages.count);
}

// acc [64,N] += z · Bᵀ; fragment(a, j) fills z's columns 16j … 16j+15 as an A operand
template <class T, bool CLUSTER, int REGS, bool BACK, class Fragment>
MOLE_DEVICE void expand(float (&acc)[REGS],
                        int rank,
                        const Stages<BACK>& stages,
                        Ring& ring,
                        Barriers& bars,
                        const Lane& me,
                        int cluster,
                        Fragment fragment) {
  for (int r = 0; r < rank; r += DEPTH) {
    uint32_t a[DEPTH / 16][4];
#pragma unroll
    for (int kk = 0; kk < DEPTH / 16; ++kk) {
      a[kk][0] = a[kk][1] = a[kk][2] = a[kk][3] = 0;
      if (r + kk * 16 < rank) fragment(a[kk], r / 16 + kk);
    }
    expand_step<T, CLUSTER>(acc, a, stages, ring, bars, me, cluster);
  }
}

// the same with z in the registers that h was accumulated in: an accumulator of 16 columns is an A operand
// but for its rounding
template <class T, int REGS, int H, bool BACK>
MOLE_DEVICE void expand_registers(float (&acc)[REGS],
                                  const float (&z)[H],
                                  int rank,
                                  const Stages<BACK>& stages,
                                  Ring& ring,
                                  Barriers& bars,
                                  const Lane& me) {
#pragma unroll
  for (int r = 0; r < 2 * H; r += DEPTH) {
    if (r >= rank) break;
    uint32_t a[DEPTH / 16][4];
#pragma unroll
    for (int kk = 0; kk < DEPTH / 16; ++kk)
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const int i = r / 2 + kk * 8 + q * 2;
        a[kk][q] = i + 1 < H ? pack2<T>(z[i < H ? i : 0], z[i + 1 < H ? i + 1 : 0]) : 0u;
      }
    expand_step<T, false>(acc, a, stages, ring, bars, me, 1);
  }
}

// y tile: bias added, rounded, staged in boxes of 32 columns (64-byte swizzle: no bank conflict), stored by
// TMA; overlaps what follows
template <class T, int REGS>
MOLE_DEVICE void store_tile(const float (&acc)[REGS],
                            unsigned char* staging,
                            const CUtensorMap* y,
                            const Params& p,
                            int n0,
                            int position,
                            int group,
                            const Lane& me) {
  constexpr int N = 2 * REGS;
  unsigned char* mine = staging + me.group * 64 * N * 2;
  const bool leader = me.warp == 0 && me.lane == 0;
  if (leader) bulk_wait_read<0>();
  named_barrier_sync(1 + me.group, 128);
#pragma unroll
  for (int i = 0; i < N / 2; i += 2) {
    const int row = me.row(i), column = me.column(i), n = n0 + column;
    // N is a multiple of 8: both columns are inside, or neither
    const uint32_t b =
        p.bias && n < p.N ? *reinterpret_cast<const uint32_t*>(static_cast<const char*>(p.bias) + n * 2) : 0u;
    const uint32_t offset =
        column / 32 * (64 * 64) + row * 64 + ((column % 32 / 8) ^ ((row >> 1) & 3)) * 16 + column % 8 * 2;
    *reinterpret_cast<uint32_t*>(mine + offset) = pack2<T>(acc[i] + low_of<T>(b), acc[i + 1] + high_of<T>(b));
  }
  fence_proxy_async_shared();
  named_barrier_sync(1 + me.group, 128);
  if (leader) {
    for (int column = 0; column < N && n0 + column < p.N; column += 32)
      tma_store_3d(y, mine + column / 32 * (64 * 64), n0 + column, position, group);
    bulk_commit();
  }
}

}  // namespace mole::sm90

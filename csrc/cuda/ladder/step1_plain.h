// Step 1, a plain product y = x Wᵀ: one tile of y for each CTA, TMA into a ring of stages, wgmma, stores
// straight from registers.
//
// One thread loads; each of GROUPS warp groups multiplies 64 rows. Maps and Params as in sm90/, of which only
// x, w, K, N, span and stages are read; Params.h is y.
#pragma once

#include "../sm90/maps.h"
#include "../sm90/pipeline.h"

namespace mole::sm90::ladder {

// barriers of the ring, ready for all threads of the CTA
template <int GROUPS>
MOLE_DEVICE void start_ring(Barriers& bars, int stages) {
  if (threadIdx.x == 0) {
    for (int s = 0; s < stages; ++s) {
      mbarrier_init(&bars.full[s], 1);
      mbarrier_init(&bars.empty[s], 4 * GROUPS);
    }
    fence_mbarrier_init();
  }
  __syncthreads();
}

// one thread: the stages of one tile's K steps
template <int BM, int BN>
MOLE_DEVICE void load_steps(const Maps& maps,
                            const Params& p,
                            const Stages<false>& stages,
                            unsigned char* smem,
                            Barriers& bars,
                            Ring& ring,
                            int m0,
                            int n0) {
  for (int k = 0; k < p.K; k += DEPTH) {
    mbarrier_wait(&bars.empty[ring.slot], ring.phase ^ 1);
    uint64_t* full = &bars.full[ring.slot];
    mbarrier_arrive_expect_tx(full, (BM + BN) * ROW_BYTES);
    unsigned char* stage = smem + ring.slot * stages.bytes;
    tma_load_3d(stage, &maps.x, full, k, m0, 0);
    tma_load_3d(stage + BM * ROW_BYTES, &maps.w, full, k, n0, 0);
    ring.advance(p.stages);
  }
}

// y tile from registers: a quad of lanes writes 16 bytes of a row
template <class T, int REGS>
MOLE_DEVICE void store_registers(const float (&acc)[REGS], const Params& p, int m0, int n0, const Lane& me) {
#pragma unroll
  for (int i = 0; i < REGS; i += 2) {
    const int m = m0 + me.group * 64 + me.row(i), n = n0 + me.column(i);
    if (m < p.span && n < p.N)
      *reinterpret_cast<uint32_t*>(static_cast<char*>(p.h) + (int64_t(m) * p.N + n) * 2) =
          pack2<T>(acc[i], acc[i + 1]);
  }
}

template <class T, int GROUPS, int BN>
MOLE_DEVICE void plain(const Maps& maps, const Params& p) {
  constexpr int BM = 64 * GROUPS;
  unsigned char* smem = dynamic_smem();
  const Stages<false> stages{smem, (BM + BN) * ROW_BYTES, BM * ROW_BYTES, p.stages};
  Barriers& bars = *reinterpret_cast<Barriers*>(smem + p.stages * stages.bytes);
  start_ring<GROUPS>(bars, p.stages);
  const int thread = int(threadIdx.x), m0 = int(blockIdx.x) / p.column_tiles * BM,
            n0 = int(blockIdx.x) % p.column_tiles * BN;
  Ring ring;
  if (thread < 128) {
    registers_decrease<40>();
    if (thread == 0) load_steps<BM, BN>(maps, p, stages, smem, bars, ring, m0, n0);
  } else {
    registers_increase<GROUPS == 1 ? 240 : 232>();
    const Lane me(thread - 128);
    float y[BN / 2];
    base_product<T, false>(y, stages, (p.K + DEPTH - 1) / DEPTH, ring, bars, me, 1);
    store_registers<T>(y, p, m0, n0, fresh(me));
  }
}

}  // namespace mole::sm90::ladder

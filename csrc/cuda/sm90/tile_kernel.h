// `cluster` and `recompute`: every CTA makes its tile of y and, stacked under W's rows in the same wgmma,
// columns of h.
//
// recompute  all columns of h; gated in registers, they are the A operand of the expand
// cluster    1/c of them: the CTAs of a cluster lie along N, share their tile of x by multicast, and hand one
// another gated
//            16-bit slices through distributed shared memory, so that each gate is applied once for each
//            cluster
//
// BACK: dX by the same kernel with its roles swapped. No logits are made; the CTAs hand one another their
// shares of D with their slices of dh, and dlogit·Φ is one more step of the expand.
//
// One warp loads, each of `GROUPS` warp groups owns 64 rows. See docs/kernels/sm90.md for the hand-overs and
// what could go wrong.
#pragma once

#include "backward.h"
#include "maps.h"

namespace mole::sm90 {

// which tile an item is: clusters of column tiles, all of a row tile's one after another
struct Item {
  Rows rows;
  int n0, set;
  bool first;  // of its row tile: writes what the row tile has but once
};

template <int BM, int BN>
MOLE_DEVICE Item tile_item(const Params& p, int i, int cluster, int rank) {
  const int across = (p.column_tiles + cluster - 1) / cluster;
  const int row = i / across, column = i % across;
  const int group = row / p.row_tiles, tile = row % p.row_tiles;
  return {{group, tile, tile * BM}, (column * cluster + rank) * BN, set_of(p, group), column == 0};
}

// the driver's 128 bytes of each map take their way to the multiprocessor while barriers are made
MOLE_DEVICE void prefetch_maps(const Maps& maps) {
  for (const CUtensorMap* map : {&maps.x, &maps.w, &maps.down, &maps.up, &maps.y}) tma_prefetch(map);
}

// what one thread does: x, W, A and token_weight for each 64 columns of K, then B for each 64 rank columns.
// NX rows of B more than y's columns: the expand then has the base's n, and ptxas need not find room for
// accumulators of two sizes (it does not: C7511). Nobody reads them
template <int BM, int BN, int NX, bool CLUSTER, bool BACK>
MOLE_DEVICE void produce_tiles(const Maps& maps,
                               const Params& p,
                               unsigned char* smem,
                               const Shared& at,
                               Barriers& bars,
                               int cluster,
                               int rank,
                               int items,
                               int stride) {
  Ring ring;
  constexpr int ALL = BACK ? BN + boxed(NX) : BN + NX;
  const uint32_t bytes =
      BACK ? (BM + ALL) * ROW_BYTES : (BM + BN + p.slice + (p.token ? LOGITS : 0)) * ROW_BYTES;
  const int part = BM / cluster;
  const uint16_t everyone = uint16_t((1u << cluster) - 1);
  for (int i = int(blockIdx.x) / cluster; i < items; i += stride) {
    const Item item = tile_item<BM, BN>(p, i, cluster, rank);
    for (int k = 0; k < p.K; k += DEPTH) {
      wait_stage<CLUSTER>(&bars.empty[ring.slot], ring.phase ^ 1);
      uint64_t* full = &bars.full[ring.slot];
      mbarrier_arrive_expect_tx(full, bytes);
      unsigned char* stage = smem + ring.slot * at.stage;
      unsigned char* w = stage + BM * ROW_BYTES;
      if (CLUSTER)
        tma_load_3d_multicast(stage + rank * part * ROW_BYTES, &maps.x, full, k,
                              item.rows.position + rank * part, item.rows.group, everyone);
      else
        tma_load_3d(stage, &maps.x, full, k, item.rows.position, item.rows.group);
      load_right<BACK>(w, &maps.w, full, k, item.n0, 0, BN);
      load_right<BACK>(w + BN * ROW_BYTES, &maps.down, full, k, rank * p.slice, item.set, NX);
      if (!BACK && p.token) tma_load_3d(w + (BN + p.slice) * ROW_BYTES, &maps.token_weight, full, k, 0, 0);
      ring.advance(p.stages);
    }
    for (int r = 0; r < p.R; r += DEPTH) {
      wait_stage<CLUSTER>(&bars.empty[ring.slot], ring.phase ^ 1);
      mbarrier_arrive_expect_tx(&bars.full[ring.slot], ALL * ROW_BYTES);
      load_right<BACK>(smem + ring.slot * at.stage + BM * ROW_BYTES, &maps.up, &bars.full[ring.slot], r,
                       item.n0, item.set, ALL);
      ring.advance(p.stages);
    }
    if (BACK && p.token) {
      wait_stage<CLUSTER>(&bars.empty[ring.slot], ring.phase ^ 1);
      mbarrier_arrive_expect_tx(&bars.full[ring.slot], ALL * LOGIT_DEPTH * 2);
      load_right<BACK>(smem + ring.slot * at.stage + BM * ROW_BYTES, &maps.token_weight,
                       &bars.full[ring.slot], 0, item.n0, 0, ALL, LOGIT_DEPTH);
      ring.advance(p.stages);
    }
  }
}

// the pooled gate: this tile's share of the logits goes out, and the sample's gate comes back
template <int GROUPS, int H>
MOLE_DEVICE void await_sample_gate(const float (&h)[H],
                                   const Params& p,
                                   unsigned char* smem,
                                   const Shared& at,
                                   const Item& item,
                                   const Lane& me,
                                   int cluster,
                                   int rank) {
  const Flags flags{p.groups, p.row_tiles};
  if (item.first) {
    const int shares = p.row_tiles * cluster * GROUPS;
    const int mine = (item.rows.tile * cluster + rank) * GROUPS + me.group;
    float* share = p.parts + (int64_t(item.rows.group) * shares + mine) * p.E;
    const int32_t* owner = reinterpret_cast<const int32_t*>(smem + at.owner);
    pool_share(h, reinterpret_cast<float*>(smem + at.sums), share, owner, p, item.rows, me, rank * p.slice);
    if (me.warp == 0) arrive_pooled(p, flags, item.rows, shares, me);
  }
  wait_for(p.flags + flags.gate_ready(item.rows.group), 1, me);
}

// the peers have read what the last tile left in their z
MOLE_DEVICE void await_free_z(Barriers& bars, const Lane& me, uint32_t phase) {
  mbarrier_wait_cluster(&bars.z_free[me.group], phase ^ 1);
}

// this CTA's shares of D -> global memory, once for each row tile, and with a token gate the `parts`
// [cluster,BM,E] of every CTA
template <class T, int BM, bool CLUSTER, int H>
MOLE_DEVICE void give_shares(const float (&v)[H],
                             const Params& p,
                             float* parts,
                             const Item& item,
                             const Lane& me,
                             int cluster,
                             int rank) {
  if (!p.d && !p.token) return;
  shares_of_d<T>(v, p, item.rows, me, rank * p.slice, [&](int e, const float (&sums)[2]) {
    if (item.first && p.d) save_share(sums, p, item.rows, me, rank, e);
    if (!p.token) return;
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      float* mine = parts + (rank * BM + me.group * 64 + me.row(2 * s)) * p.E + e;
      if constexpr (CLUSTER) {
        for (int to = me.lane % 4; to < cluster; to += 4) st_cluster(cluster_map(mine, to), sums[s]);
      } else {
        if (me.lane % 4 == 0) *mine = sums[s];
      }
    }
  });
  __syncwarp();
}

// gated slice -> the z tile of every CTA of the cluster; then this CTA's z is whole
template <class T, int H>
MOLE_DEVICE void exchange(const float (&h)[H],
                          const Params& p,
                          unsigned char* z,
                          int pitch,
                          Barriers& bars,
                          const Lane& me,
                          int cluster,
                          int rank,
                          uint32_t phase) {
  for (int to = 0; to < cluster; ++to) {
    const uint32_t base = cluster_map(z, to);
#pragma unroll
    for (int i = 0; i < H; i += 2) {
      const int column = me.column(i);
      if (column < p.slice)
        st_cluster(base + (me.group * 64 + me.row(i)) * pitch + (rank * p.slice + column) * 2,
                   pack2<T>(h[i], h[i + 1]));
    }
  }
  named_barrier_sync(1 + me.group, 128);
  if (me.warp == 0 && me.lane < cluster) mbarrier_arrive_remote(&bars.z_full[me.group], me.lane);
  mbarrier_wait_cluster(&bars.z_full[me.group], phase);
}

// acc += dlogit·Φ in the last stage of a tile
template <class T, int BM, bool CLUSTER, int REGS, bool BACK>
MOLE_DEVICE void add_logits(float (&acc)[REGS],
                            const Params& p,
                            const float* parts,
                            const Item& item,
                            const Stages<BACK>& stages,
                            Ring& ring,
                            Barriers& bars,
                            const Lane& me,
                            int cluster) {
  uint32_t a[1][4];
  logit_fragment<T>(a, p, item.rows, me, [&](int row, int64_t, int e) {
    float sum = 0;
    for (int c = 0; c < cluster; ++c) sum += parts[(c * BM + me.group * 64 + row) * p.E + e];
    return sum;
  });
  expand_step<T, CLUSTER>(acc, a, stages, ring, bars, me, cluster);
}

template <class T, int GROUPS, int BN, int NX, bool CLUSTER, bool BACK>
MOLE_DEVICE void consume_tiles(const Maps& maps,
                               const Params& p,
                               unsigned char* smem,
                               const Shared& at,
                               Barriers& bars,
                               const Lane& me,
                               int cluster,
                               int rank,
                               int items,
                               int stride) {
  constexpr int BM = 64 * GROUPS;
  const Stages<BACK> stages{smem, at.stage, BM * ROW_BYTES, p.stages};
  Ring ring;
  uint32_t z_phase = 0;
  float *gamma = reinterpret_cast<float*>(smem + at.gamma),
        *parts = reinterpret_cast<float*>(smem + at.parts);
  const int32_t* owner = reinterpret_cast<const int32_t*>(smem + at.owner);
  for (int i = int(blockIdx.x) / cluster; i < items; i += stride) {
    Item item = tile_item<BM, BN>(p, i, cluster, rank);
    item.rows.position += 64 * me.group;
    float acc[(BN + NX) / 2];
    base_product<T, CLUSTER>(acc, stages, (p.K + DEPTH - 1) / DEPTH, ring, bars, me, cluster);
    const Lane lane = fresh(me);
    // a copy: were h gated in place, ptxas would move accumulators about and run the products one after
    // another
    float h[NX / 2];
#pragma unroll
    for (int j = 0; j < NX / 2; ++j) h[j] = acc[BN / 2 + j];
    if constexpr (BACK) {
      saved_gates(gamma, p, item.rows, lane);
    } else {
      if (CLUSTER && p.pooled) await_sample_gate<GROUPS>(h, p, smem, at, item, lane, cluster, rank);
      row_gates(h, gamma, p, item.rows, lane, item.first && rank == 0, p.pooled);
      if (item.first && p.save) save_columns<T>(h, p.h, p, item.rows, lane, rank * p.slice);
    }
    if (CLUSTER) await_free_z(bars, lane, z_phase);
    if constexpr (BACK) give_shares<T, BM, CLUSTER>(h, p, parts, item, lane, cluster, rank);
    gate_columns(h, gamma, owner, p, lane, rank * p.slice);
    if (BACK && item.first && p.dh) save_columns<T>(h, p.dh, p, item.rows, lane, rank * p.slice);
    if constexpr (CLUSTER) {
      unsigned char* z = smem + at.z;
      exchange<T>(h, p, z, at.z_pitch, bars, lane, cluster, rank, z_phase);
      const unsigned char* row = z + (lane.group * 64 + lane.row(0)) * at.z_pitch + lane.lane % 4 * 4;
      expand<T, true>(acc, p.R, stages, ring, bars, lane, cluster, [&](uint32_t (&a)[4], int j) {
        for (int q = 0; q < 4; ++q)
          a[q] = *reinterpret_cast<const uint32_t*>(row + q % 2 * 8 * at.z_pitch + (j * 16 + q / 2 * 8) * 2);
      });
      if constexpr (BACK) {
        if (p.token) add_logits<T, BM, CLUSTER>(acc, p, parts, item, stages, ring, bars, lane, cluster);
      }
      named_barrier_sync(1 + lane.group, 128);
      if (lane.warp == 0 && lane.lane < cluster) mbarrier_arrive_remote(&bars.z_free[lane.group], lane.lane);
      z_phase ^= 1;
    } else {
      expand_registers<T>(acc, h, p.R, stages, ring, bars, lane);
      if constexpr (BACK) {
        if (p.token) add_logits<T, BM, CLUSTER>(acc, p, parts, item, stages, ring, bars, lane, 1);
      }
    }
    const float (&y)[BN / 2] = reinterpret_cast<const float (&)[BN / 2]>(acc);
    store_tile<T>(y, smem + at.staging, &maps.y, p, item.n0, item.rows.position, item.rows.group, lane);
  }
  if (me.warp == 0 && me.lane == 0) bulk_wait<0>();
}

// threads: 128 · (GROUPS + 1); the first warp group loads
template <class T, int GROUPS, int BN, int NX, bool CLUSTER, bool BACK = false>
MOLE_DEVICE void tile_kernel(const Maps& maps, const Params& p) {
  constexpr int BM = 64 * GROUPS;
  const int cluster = CLUSTER ? int(cluster_size()) : 1, rank = CLUSTER ? int(cluster_rank()) : 0;
  unsigned char* smem = dynamic_smem();
  static_assert(!BACK || BN % BOX == 0, "V's boxes follow W's");
  const Shared at =
      shared_layout(BM, BN, BN + (BACK ? boxed(NX) : NX), p.stages, CLUSTER ? p.slices * p.slice : 0, NX,
                    p.slices * p.slice + LOGITS, BACK && p.token ? cluster * p.E : 0);
  Barriers& bars = *reinterpret_cast<Barriers*>(smem + at.barriers);
  const int thread = int(threadIdx.x);
  if (thread == 0) {
    prefetch_maps(maps);
    for (int s = 0; s < p.stages; ++s) {
      mbarrier_init(&bars.full[s], 1);
      mbarrier_init(&bars.empty[s], 4 * GROUPS * cluster);
    }
    for (int g = 0; CLUSTER && g < GROUPS; ++g) {
      mbarrier_init(&bars.z_full[g], cluster);
      mbarrier_init(&bars.z_free[g], cluster);
    }
    fence_mbarrier_init();
  }
  fill_owners(reinterpret_cast<int32_t*>(smem + at.owner), p, p.slices * p.slice + LOGITS, thread,
              128 * (GROUPS + 1));
  if (CLUSTER)
    cluster_sync();
  else
    __syncthreads();
  const int across = (p.column_tiles + cluster - 1) / cluster;
  const int items = p.groups * p.row_tiles * across, stride = int(gridDim.x) / cluster;
  if (thread < 128) {
    registers_decrease<40>();
    if (thread == 0)
      produce_tiles<BM, BN, NX, CLUSTER, BACK>(maps, p, smem, at, bars, cluster, rank, items, stride);
    // whole warps come to the barriers below
    __syncwarp();
  } else {
    registers_increase<GROUPS == 1 ? 240 : 232>();
    consume_tiles<T, GROUPS, BN, NX, CLUSTER, BACK>(maps, p, smem, at, bars, Lane(thread - 128), cluster,
                                                    rank, items, stride);
  }
  // no CTA may go while a peer still writes into it or announces something there
  if (CLUSTER)
    cluster_sync();
  else if (p.pooled)
    __syncthreads();
  if (p.pooled && thread < 32) leave(p, Flags{p.groups, p.row_tiles}.count(), int(gridDim.x), thread);
}

}  // namespace mole::sm90

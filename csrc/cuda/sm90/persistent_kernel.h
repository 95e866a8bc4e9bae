// `persistent`: tiles of h first, tiles of y after, in one launch; h goes through global memory, announced by
// counters.
//
// A ticket counter hands out the tiles of h. A CTA takes its next ticket without waiting for anyone, and goes
// on to tiles of y only with a ticket past the last tile of h: then every tile of h was taken by a CTA that
// runs, and making one waits for nobody. So nobody waits for ever, however few CTAs are resident. The ticket
// past the end is also the CTA's place among the tiles of y, which spares those that made one h more the
// ragged last wave.
//
// BACK: dX by the same kernel with its roles swapped. Tiles of V leave dh, rounded, and their shares of D,
// both of which the second launch of the backward wants anyway; tiles of dX read them and make dlogit.
#pragma once

#include "tile_kernel.h"

namespace mole::sm90 {

constexpr int NO_ITEM = -1;

// item i: i < h_tiles, the i-th tile of h (all column tiles of a row tile one after another), else the (i −
// h_tiles)-th tile of y
struct Split {
  int h_tiles, y_tiles;
  MOLE_HOST_DEVICE explicit Split(const Params& p)
      : h_tiles(p.groups * p.row_tiles * p.slices), y_tiles(p.groups * p.row_tiles * p.column_tiles) {}
};

// tiles of y that follow one another share columns of W: `TALL` row tiles at a time
constexpr int TALL = 8;

template <int BM>
MOLE_DEVICE Rows row_tile(const Params& p, int row) {
  return {row / p.row_tiles, row % p.row_tiles, row % p.row_tiles * BM};
}

template <int BM, int BN>
MOLE_DEVICE Item y_item(const Params& p, int i) {
  const int rows = p.groups * p.row_tiles, width = TALL * p.column_tiles;
  const int top = i / width * TALL, height = rows - top < TALL ? rows - top : TALL;
  const Rows at = row_tile<BM>(p, top + i % width % height);
  return {at, i % width / height * BN, set_of(p, at.group), false};
}

// the producer's side of the hand-over: what comes next, written where all consumers read it
MOLE_DEVICE void announce(int item, Ring& ring, Barriers& bars) {
  mbarrier_wait(&bars.item_free[ring.slot], ring.phase ^ 1);
  bars.item[ring.slot] = item;
  mbarrier_arrive(&bars.item_full[ring.slot]);
  ring.advance(2);
}

MOLE_DEVICE int next_item(Ring& ring, Barriers& bars) {
  mbarrier_wait(&bars.item_full[ring.slot], ring.phase);
  const int item = bars.item[ring.slot];
  mbarrier_arrive(&bars.item_free[ring.slot]);
  ring.advance(2);
  return item;
}

template <int BM, int NH, bool BACK>
MOLE_DEVICE void load_h_tile(const Maps& maps,
                             const Params& p,
                             unsigned char* smem,
                             const Shared& at,
                             Barriers& bars,
                             Ring& ring,
                             int item) {
  const Rows rows = row_tile<BM>(p, item / p.slices);
  const int first = item % p.slices * p.slice, set = set_of(p, rows.group);
  const uint32_t bytes = (BM + (BACK ? boxed(NH) : p.slice + (p.token ? LOGITS : 0))) * ROW_BYTES;
  for (int k = 0; k < p.K; k += DEPTH) {
    mbarrier_wait(&bars.empty[ring.slot], ring.phase ^ 1);
    uint64_t* full = &bars.full[ring.slot];
    mbarrier_arrive_expect_tx(full, bytes);
    unsigned char* stage = smem + ring.slot * at.stage;
    tma_load_3d(stage, &maps.x, full, k, rows.position, rows.group);
    load_right<BACK>(stage + BM * ROW_BYTES, &maps.down, full, k, first, set, NH);
    if (!BACK && p.token) tma_load_3d(stage + (BM + p.slice) * ROW_BYTES, &maps.token_weight, full, k, 0, 0);
    ring.advance(p.stages);
  }
}

template <int BM, int BN, bool BACK>
MOLE_DEVICE void load_y_tile(const Maps& maps,
                             const Params& p,
                             unsigned char* smem,
                             const Shared& at,
                             Barriers& bars,
                             Ring& ring,
                             int tile) {
  const Item item = y_item<BM, BN>(p, tile);
  for (int k = 0; k < p.K; k += DEPTH) {
    mbarrier_wait(&bars.empty[ring.slot], ring.phase ^ 1);
    uint64_t* full = &bars.full[ring.slot];
    mbarrier_arrive_expect_tx(full, (BM + BN) * ROW_BYTES);
    unsigned char* stage = smem + ring.slot * at.stage;
    tma_load_3d(stage, &maps.x, full, k, item.rows.position, item.rows.group);
    load_right<BACK>(stage + BM * ROW_BYTES, &maps.w, full, k, item.n0, 0, BN);
    ring.advance(p.stages);
  }
  for (int r = 0; r < p.R; r += DEPTH) {
    mbarrier_wait(&bars.empty[ring.slot], ring.phase ^ 1);
    mbarrier_arrive_expect_tx(&bars.full[ring.slot], BN * ROW_BYTES);
    load_right<BACK>(smem + ring.slot * at.stage + BM * ROW_BYTES, &maps.up, &bars.full[ring.slot], r,
                     item.n0, item.set, BN);
    ring.advance(p.stages);
  }
  if (BACK && p.token) {
    mbarrier_wait(&bars.empty[ring.slot], ring.phase ^ 1);
    mbarrier_arrive_expect_tx(&bars.full[ring.slot], BN * LOGIT_DEPTH * 2);
    load_right<BACK>(smem + ring.slot * at.stage + BM * ROW_BYTES, &maps.token_weight, &bars.full[ring.slot],
                     0, item.n0, 0, BN, LOGIT_DEPTH);
    ring.advance(p.stages);
  }
}

template <int BM, int BN, int NH, bool BACK>
MOLE_DEVICE void produce_items(
    const Maps& maps, const Params& p, unsigned char* smem, const Shared& at, Barriers& bars) {
  const Split split(p);
  Ring ring, items;
  uint32_t ticket = atomic_add_relaxed(p.flags + Flags::ticket(), 1);
  for (; int(ticket) < split.h_tiles; ticket = atomic_add_relaxed(p.flags + Flags::ticket(), 1)) {
    announce(int(ticket), items, bars);
    load_h_tile<BM, NH, BACK>(maps, p, smem, at, bars, ring, int(ticket));
  }
  for (int tile = int(ticket) - split.h_tiles; tile < split.y_tiles; tile += int(gridDim.x)) {
    announce(split.h_tiles + tile, items, bars);
    load_y_tile<BM, BN, BACK>(maps, p, smem, at, bars, ring, tile);
  }
  announce(NO_ITEM, items, bars);
}

// z [64,2H] -> workspace in float: it is rounded once, where it is read and has met its sample gate
template <int H>
MOLE_DEVICE void store_z(const float (&z)[H], const Params& p, const Rows& rows, const Lane& me, int first) {
#pragma unroll
  for (int i = 0; i < H; i += 2) {
    const int row = me.row(i), column = me.column(i), r = first + column;
    if (column < p.slice && r < p.R && rows.holds(p, row))
      *reinterpret_cast<float2*>(p.z + rows.index(p, row) * p.R + r) = make_float2(z[i], z[i + 1]);
  }
}

// this warp group's part of a tile of h is in global memory; all its threads have come to a barrier
MOLE_DEVICE void announce_rows(const Params& p, const Rows& rows, const Lane& me) {
  const Flags flags{p.groups, p.row_tiles};
  if (me.warp == 0 && me.lane == 0) reduce_add_release(p.flags + flags.rows_ready(rows.group, rows.tile), 1);
}

// a tile of h: gated, stored, and announced by its rows' counter (by its sample's, where the sample gate is
// still to come)
template <class T, int GROUPS, int H>
MOLE_DEVICE void finish_h_tile(const float (&acc)[H],
                               const Params& p,
                               unsigned char* smem,
                               const Shared& at,
                               const Rows& rows,
                               int column,
                               const Lane& me) {
  const Flags flags{p.groups, p.row_tiles};
  float* gamma = reinterpret_cast<float*>(smem + at.gamma);
  const int32_t* owner = reinterpret_cast<const int32_t*>(smem + at.owner);
  const int first = column * p.slice;
  float h[H];
#pragma unroll
  for (int i = 0; i < H; ++i) h[i] = acc[i];
  row_gates(h, gamma, p, rows, me, column == 0, false);
  if (p.save) save_columns<T>(h, p.h, p, rows, me, first);
  const int shares = p.row_tiles * p.slices * GROUPS;
  if (p.pooled) {
    const int mine = (rows.tile * p.slices + column) * GROUPS + me.group;
    float* share = p.parts + (int64_t(rows.group) * shares + mine) * p.E;
    pool_share(h, reinterpret_cast<float*>(smem + at.sums), share, owner, p, rows, me, first);
  }
  gate_columns(h, gamma, owner, p, me, first);
  store_z(h, p, rows, me, first);
  named_barrier_sync(1 + me.group, 128);
  if (p.pooled) {
    if (me.warp == 0) arrive_pooled(p, flags, rows, shares, me);
  } else {
    announce_rows(p, rows, me);
  }
}

// a tile of V: its share of D, dh, and its rows' counter
template <class T, int GROUPS, int H>
MOLE_DEVICE void finish_v_tile(const float (&acc)[H],
                               const Params& p,
                               unsigned char* smem,
                               const Shared& at,
                               const Rows& rows,
                               int column,
                               const Lane& me) {
  float* gamma = reinterpret_cast<float*>(smem + at.gamma);
  const int first = column * p.slice;
  float v[H];
#pragma unroll
  for (int i = 0; i < H; ++i) v[i] = acc[i];
  saved_gates(gamma, p, rows, me);
  if (p.d)
    shares_of_d<T>(v, p, rows, me, first,
                   [&](int e, const float (&sums)[2]) { save_share(sums, p, rows, me, column, e); });
  gate_columns(v, gamma, reinterpret_cast<const int32_t*>(smem + at.owner), p, me, first);
  save_columns<T>(v, p.dh, p, rows, me, first);
  named_barrier_sync(1 + me.group, 128);
  announce_rows(p, rows, me);
}

// columns 16j … 16j+15 of dh as an A operand
MOLE_DEVICE void dh_fragment(uint32_t (&a)[4], int j, const Params& p, const Rows& rows, const Lane& me) {
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    const int row = me.row(q % 2 * 2), r = j * 16 + q / 2 * 8 + me.lane % 4 * 2;
    const bool inside = r < p.R && rows.holds(p, row);
    a[q] = inside ? *reinterpret_cast<const uint32_t*>(static_cast<const char*>(p.dh) +
                                                       (rows.index(p, row) * p.R + r) * 2)
                  : 0u;
  }
}

// columns 16j … 16j+15 of z as an A operand, times the sample gate, rounded
template <class T>
MOLE_DEVICE void z_fragment(
    uint32_t (&a)[4], int j, const Params& p, const Rows& rows, const int32_t* owner, const Lane& me) {
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    const int row = me.row(q % 2 * 2), r = j * 16 + q / 2 * 8 + me.lane % 4 * 2;
    float2 z = make_float2(0.0f, 0.0f);
    if (r < p.R && rows.holds(p, row))
      z = *reinterpret_cast<const float2*>(p.z + rows.index(p, row) * p.R + r);
    if (p.pooled && r < p.R) {
      const float* gate = p.sample_gate + rows.group * p.E;
      z.x *= gate[owner[r]], z.y *= gate[owner[r + 1]];
    }
    a[q] = pack2<T>(z.x, z.y);
  }
}

// y += dh·A + dlogit·Φ, by what the tiles of V left
template <class T, int REGS>
MOLE_DEVICE void expand_back(float (&y)[REGS],
                             const Params& p,
                             const Rows& rows,
                             const Stages<true>& stages,
                             Ring& ring,
                             Barriers& bars,
                             const Lane& me) {
  expand<T, false>(y, p.R, stages, ring, bars, me, 1,
                   [&](uint32_t (&a)[4], int j) { dh_fragment(a, j, p, rows, me); });
  if (!p.token) return;
  uint32_t a[1][4];
  logit_fragment<T>(a, p, rows, me, [&](int, int64_t m, int e) {
    float sum = 0;
    for (int j = 0; j < p.slices; ++j) sum += p.d[(int64_t(j) * p.groups * p.span + m) * p.E + e];
    return sum;
  });
  expand_step<T, false>(y, a, stages, ring, bars, me, 1);
}

template <class T, int GROUPS, int BN, int NH, bool BACK>
MOLE_DEVICE void consume_items(const Maps& maps,
                               const Params& p,
                               unsigned char* smem,
                               const Shared& at,
                               Barriers& bars,
                               const Lane& me) {
  constexpr int BM = 64 * GROUPS;
  const Split split(p);
  const Stages<BACK> stages{smem, at.stage, BM * ROW_BYTES, p.stages};
  const Flags flags{p.groups, p.row_tiles};
  const int steps = (p.K + DEPTH - 1) / DEPTH;
  Ring ring, items;
  int next = next_item(items, bars);
  for (; next != NO_ITEM && next < split.h_tiles; next = next_item(items, bars)) {
    float h[NH / 2];
    base_product<T, false>(h, stages, steps, ring, bars, me, 1);
    Rows rows = row_tile<BM>(p, next / p.slices);
    rows.position += 64 * me.group;
    if constexpr (BACK)
      finish_v_tile<T, GROUPS>(h, p, smem, at, rows, next % p.slices, fresh(me));
    else
      finish_h_tile<T, GROUPS>(h, p, smem, at, rows, next % p.slices, fresh(me));
  }
  for (; next != NO_ITEM; next = next_item(items, bars)) {
    Item item = y_item<BM, BN>(p, next - split.h_tiles);
    item.rows.position += 64 * me.group;
    float y[BN / 2];
    base_product<T, false>(y, stages, steps, ring, bars, me, 1);
    const Lane lane = fresh(me);
    if (p.pooled)
      wait_for(p.flags + flags.gate_ready(item.rows.group), 1, lane);
    else
      wait_for(p.flags + flags.rows_ready(item.rows.group, item.rows.tile), p.slices * GROUPS, lane);
    if constexpr (BACK)
      expand_back<T>(y, p, item.rows, stages, ring, bars, lane);
    else
      expand<T, false>(y, p.R, stages, ring, bars, lane, 1, [&](uint32_t (&a)[4], int j) {
        z_fragment<T>(a, j, p, item.rows, reinterpret_cast<const int32_t*>(smem + at.owner), lane);
      });
    store_tile<T>(y, smem + at.staging, &maps.y, p, item.n0, item.rows.position, item.rows.group, lane);
  }
  if (me.warp == 0 && me.lane == 0) bulk_wait<0>();
}

// NH columns of h in a tile of h.  threads: 128 · (GROUPS + 1); the first warp group loads
template <class T, int GROUPS, int BN, int NH, bool BACK = false>
MOLE_DEVICE void persistent_kernel(const Maps& maps, const Params& p) {
  constexpr int BM = 64 * GROUPS, WIDE = BACK ? boxed(NH) : NH, LOADED = BN > WIDE ? BN : WIDE;
  unsigned char* smem = dynamic_smem();
  const Shared at = shared_layout(BM, BN, LOADED, p.stages, 0, NH, p.slices * p.slice + LOGITS);
  Barriers& bars = *reinterpret_cast<Barriers*>(smem + at.barriers);
  const int thread = int(threadIdx.x);
  if (thread == 0) {
    prefetch_maps(maps);
    for (int s = 0; s < p.stages; ++s) {
      mbarrier_init(&bars.full[s], 1);
      mbarrier_init(&bars.empty[s], 4 * GROUPS);
    }
    for (int i = 0; i < 2; ++i) {
      mbarrier_init(&bars.item_full[i], 1);
      mbarrier_init(&bars.item_free[i], 128 * GROUPS);
    }
    fence_mbarrier_init();
  }
  fill_owners(reinterpret_cast<int32_t*>(smem + at.owner), p, p.slices * p.slice + LOGITS, thread,
              128 * (GROUPS + 1));
  __syncthreads();
  if (thread < 128) {
    registers_decrease<40>();
    if (thread == 0) produce_items<BM, BN, NH, BACK>(maps, p, smem, at, bars);
    __syncwarp();
  } else {
    registers_increase<GROUPS == 1 ? 240 : 232>();
    consume_items<T, GROUPS, BN, NH, BACK>(maps, p, smem, at, bars, Lane(thread - 128));
  }
  __syncthreads();
  if (thread < 32) leave(p, Flags{p.groups, p.row_tiles}.count(), int(gridDim.x), thread);
}

}  // namespace mole::sm90

// The gates of a tile of h: logits out of the accumulators, γ for each row and expert, the pooled gate's
// sums; see docs/kernels/sm90.md.
#pragma once

#include "pipeline.h"

namespace mole::sm90 {

// the 64 rows that a warp group works on, or (at the producer's) its CTA's tile of rows: the first is row
// `position` of `group`
struct Rows {
  int group, tile, position;
  MOLE_HOST_DEVICE bool holds(const Params& p, int row) const { return position + row < p.span; }
  MOLE_HOST_DEVICE int64_t index(const Params& p, int row) const {
    return int64_t(group) * p.span + position + row;
  }
};

// expert of every rank column, padding to E, whose γ is 0; all threads of the CTA
MOLE_DEVICE void fill_owners(int32_t* owner, const Params& p, int columns, int thread, int threads) {
  for (int column = thread; column < columns; column += threads) {
    int expert = p.E;
    for (int e = 0; e < p.E; ++e)
      if (column >= p.first[e] && column < p.first[e + 1]) expert = e;
    owner[column] = expert;
  }
}

// the exponential of what is not above 0, by the sigmoid that we have
MOLE_DEVICE float exp_below(float x) {
  const float s = sigmoid(x);
  return s / (1.0f - s);
}

// logits of one row -> softmax over the k largest, 0 for the others; of equal ones the first counts as the
// larger. In shared memory and not unrolled: its registers would be the accumulators'
MOLE_DEVICE void softmax_row(float* row, const Params& p) {
#pragma unroll 1
  for (int e = 0; p.token_bias.at && e < p.E; ++e) row[e] += number(p.token_bias, e);
  unsigned chosen = 0;
  float most = row[0], sum = 0;
#pragma unroll 1
  for (int e = 0; e < p.E; ++e) {
    int before = 0;
#pragma unroll 1
    for (int other = 0; other < p.E; ++other)
      before += row[other] > row[e] || (row[other] == row[e] && other < e);
    if (before < p.top_k) chosen |= 1u << e;
    most = row[e] > most ? row[e] : most;
  }
#pragma unroll 1
  for (int e = 0; e < p.E; ++e) sum += row[e] = chosen >> e & 1u ? exp_below(row[e] - most) : 0.0f;
#pragma unroll 1
  for (int e = 0; e < p.E; ++e) row[e] /= sum;
}

// s·gate of row m for expert e
MOLE_DEVICE float given(const Params& p, int64_t m, int e) {
  float g = number(p.scale, e);
  if (p.gate.at) g *= number(p.gate, m / p.T * p.gate_b + m % p.T * p.gate_t + e * p.gate_e);
  return g;
}

// γ_e of this warp's 16 rows -> gamma [64·groups,E+1], 0 for rows past the end and in the last column.  h
// [64,2H] a tile of h, its logits from column `slice` on.  pooled: times the sample gate.  Each warp's rows
// are its own, so a warp barrier is enough.
template <int H>
MOLE_DEVICE void row_gates(const float (&h)[H],
                           float* gamma,
                           const Params& p,
                           const Rows& rows,
                           const Lane& me,
                           bool writes,
                           bool pooled) {
  const int pitch = p.E + 1;
  float* mine = gamma + me.group * 64 * pitch;
  if (p.token) {
#pragma unroll
    for (int i = 0; i < H; ++i) {
      const int e = me.column(i) - p.slice;
      if (e >= 0 && e < p.E) mine[me.row(i) * pitch + e] = h[i];
    }
    __syncwarp();
    if (p.top_k && me.lane < 16) softmax_row(mine + (me.warp * 16 + me.lane) * pitch, p);
    __syncwarp();
  }
  for (int at = me.lane; at < 16 * pitch; at += 32) {
    const int row = me.warp * 16 + at / pitch, e = at % pitch;
    float g = 0;
    if (e < p.E && rows.holds(p, row)) {
      const int64_t m = rows.index(p, row);
      g = given(p, m, e);
      if (p.token) {
        const float seen = mine[row * pitch + e];
        const float l = p.top_k ? seen : sigmoid(seen + (p.token_bias.at ? number(p.token_bias, e) : 0.0f));
        if (writes) p.token_gate[m * p.E + e] = l;
        g *= l;
      }
      if (pooled) g *= p.sample_gate[m / p.T * p.E + e];
    }
    mine[row * pitch + e] = g;
  }
  __syncwarp();
}

// h as it is -> out [M,R] in the layer's dtype.  first: column of R where this tile of h begins
template <class T, int H>
MOLE_DEVICE void save_columns(
    const float (&h)[H], void* out, const Params& p, const Rows& rows, const Lane& me, int first) {
#pragma unroll
  for (int i = 0; i < H; i += 2) {
    const int row = me.row(i), column = me.column(i), r = first + column;
    if (column < p.slice && r < p.R && rows.holds(p, row))
      *reinterpret_cast<uint32_t*>(static_cast<char*>(out) + (rows.index(p, row) * p.R + r) * 2) =
          pack2<T>(h[i], h[i + 1]);
  }
}

// z = γ ⊙ h in place; padding and logits become 0.  No branch in here: with branches the accumulators of y do
// not stay in registers
template <int H>
MOLE_DEVICE void gate_columns(
    float (&h)[H], const float* gamma, const int32_t* owner, const Params& p, const Lane& me, int first) {
#pragma unroll
  for (int i = 0; i < H; i += 2) {
    const int column = me.column(i);
    const float* g = gamma + (me.group * 64 + me.row(i)) * (p.E + 1);
    const float g0 = g[owner[first + column]], g1 = g[owner[first + column + 1]];
    h[i] = column < p.slice ? h[i] * g0 : 0.0f;
    h[i + 1] = column < p.slice ? h[i + 1] * g1 : 0.0f;
  }
}

// this warp group's share of the pooled logits, Σ_rows h·p for each expert -> share [E], always summed in the
// same order
template <int H>
MOLE_DEVICE void pool_share(const float (&h)[H],
                            float* sums,
                            float* share,
                            const int32_t* owner,
                            const Params& p,
                            const Rows& rows,
                            const Lane& me,
                            int first) {
  float* mine = sums + (me.group * 4 + me.warp) * (2 * H);
  const int chosen = set_of(p, rows.group);
  const int64_t set = (chosen >= 0 && chosen < p.sets ? chosen : 0) * p.pool_set;
#pragma unroll
  for (int i = 0; i < H; i += 4) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      // rows past the sample's end were loaded as zeros
      float sum = h[i + j] + h[i + j + 2];
      for (int step = 4; step < 32; step *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
      if (me.lane < 4) mine[me.column(i + j)] = sum;
    }
  }
  named_barrier_sync(1 + me.group, 128);
  const int thread = me.warp * 32 + me.lane;
  if (thread < p.E) {
    float sum = 0;
    for (int column = 0; column < p.slice; ++column) {
      const int r = first + column;
      if (r >= p.R || owner[r] != thread) continue;
      float of_column = 0;
      for (int warp = 0; warp < 4; ++warp) of_column += sums[(me.group * 4 + warp) * (2 * H) + column];
      sum += of_column * number(p.sample_weight, set + r);
    }
    share[thread] = sum;
  }
}

// The last share of a sample to arrive adds all of them in order and opens its gate; one warp.  share: as
// `pool_share` left it
MOLE_DEVICE void arrive_pooled(
    const Params& p, const Flags& flags, const Rows& rows, int shares, const Lane& me) {
  __syncwarp();
  uint32_t before = 0;
  if (me.lane == 0) before = atomic_add_acq_rel(p.flags + flags.arrived(rows.group), 1);
  before = __shfl_sync(0xffffffffu, before, 0);
  // a shuffle orders no memory: without this the other lanes may not see what lane 0 has acquired
  __syncwarp();
  if (int(before) != shares - 1) return;
  if (me.lane < p.E) {
    float sum = 0;
    const float* at = p.parts + int64_t(rows.group) * shares * p.E + me.lane;
    for (int i = 0; i < shares; ++i) sum += at[int64_t(i) * p.E];
    sum = sum / float(p.T) + (p.sample_bias.at ? number(p.sample_bias, me.lane) : 0.0f);
    p.sample_gate[rows.group * p.E + me.lane] = sigmoid(sum);
  }
  __syncwarp();
  if (me.lane == 0) reduce_add_release(p.flags + flags.gate_ready(rows.group), 1);
}

// until a counter has reached `wanted`; what was written before it was raised is then visible to the whole
// warp
MOLE_DEVICE void wait_for(const uint32_t* flag, uint32_t wanted, const Lane& me) {
  if (me.lane == 0)
    while (load_acquire(flag) < wanted) __nanosleep(20);
  __syncwarp();
}

// the last CTA to leave puts all counters back to zero; one warp, after every other thread of the CTA is done
// with them
MOLE_DEVICE void leave(const Params& p, int count, int ctas, int lane) {
  uint32_t before = 0;
  if (lane == 0) before = atomic_add_acq_rel(p.flags + Flags::left(), 1);
  before = __shfl_sync(0xffffffffu, before, 0);
  // a shuffle orders no memory: without this the other lanes may not see what lane 0 has acquired
  __syncwarp();
  if (int(before) == ctas - 1)
    for (int i = lane; i < count; i += 32) p.flags[i] = 0;
}

}  // namespace mole::sm90

// The gates of dX: dX = dY·W + dh·A + dlogit·Φ with V = dY·B, dh = γ ⊙ V, D_e = Σ_{r∈e} V·h and dlogit =
// γ(1−l)D, of a softmax γ_e D_e − l_e Σ_f γ_f D_f. h and l are what the forward saved. See
// docs/kernels/sm90.md.
#pragma once

#include "gates.h"

namespace mole::sm90 {

// γ_e of this warp's 16 rows by the saved token gate -> gamma [64·groups,E+1], 0 for rows past the end and in
// the last column
MOLE_DEVICE void saved_gates(float* gamma, const Params& p, const Rows& rows, const Lane& me) {
  const int pitch = p.E + 1;
  float* mine = gamma + me.group * 64 * pitch;
  for (int at = me.lane; at < 16 * pitch; at += 32) {
    const int row = me.warp * 16 + at / pitch, e = at % pitch;
    float g = 0;
    if (e < p.E && rows.holds(p, row)) {
      const int64_t m = rows.index(p, row);
      g = given(p, m, e);
      if (p.token) g *= p.token_gate[m * p.E + e];
    }
    mine[row * pitch + e] = g;
  }
  __syncwarp();
}

// what this tile's columns of V, from `first` on, add to D: put(e, sums of rows me.row(0) and me.row(2)) by
// every lane of a row alike
template <class T, int H, class Put>
MOLE_DEVICE void shares_of_d(
    const float (&v)[H], const Params& p, const Rows& rows, const Lane& me, int first, Put put) {
  float vh[H];
#pragma unroll
  for (int i = 0; i < H; i += 2) {
    const int row = me.row(i), r = first + me.column(i);
    uint32_t h = 0;
    if (r < p.R && rows.holds(p, row))
      h = *reinterpret_cast<const uint32_t*>(static_cast<const char*>(p.h) +
                                             (rows.index(p, row) * p.R + r) * 2);
    vh[i] = v[i] * low_of<T>(h), vh[i + 1] = v[i + 1] * high_of<T>(h);
  }
#pragma unroll 1
  for (int e = 0; e < p.E; ++e) {
    const int from = p.first[e] - first, to = p.first[e + 1] - first;
    float sums[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < H; ++i) {
      const int column = me.column(i);
      sums[(i >> 1) & 1] += column >= from && column < to ? vh[i] : 0.0f;
    }
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      sums[s] += __shfl_xor_sync(0xffffffffu, sums[s], 1);
      sums[s] += __shfl_xor_sync(0xffffffffu, sums[s], 2);
    }
    put(e, sums);
  }
}

// one share of D -> d [slices,M,E], by the first lane of each row
MOLE_DEVICE void save_share(
    const float (&sums)[2], const Params& p, const Rows& rows, const Lane& me, int slice, int e) {
#pragma unroll
  for (int s = 0; s < 2; ++s)
    if (me.lane % 4 == 0 && rows.holds(p, me.row(2 * s)))
      p.d[(int64_t(slice) * p.groups * p.span + rows.index(p, me.row(2 * s))) * p.E + e] = sums[s];
}

// dlogit as an A operand of 16 columns, the experts and then zeros; d(row, m, e) is D of row m.  The four
// lanes of a row hold all of it
template <class T, class D>
MOLE_DEVICE void logit_fragment(uint32_t (&a)[1][4], const Params& p, const Rows& rows, const Lane& me, D d) {
#pragma unroll
  for (int q = 0; q < 2; ++q) {
    const int row = me.row(2 * q);
    float gd[2] = {0, 0}, l[2] = {0, 0};
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int e = me.lane % 4 * 2 + j;
      if (e < p.E && rows.holds(p, row)) {
        const int64_t m = rows.index(p, row);
        l[j] = p.token_gate[m * p.E + e];
        gd[j] = given(p, m, e) * l[j] * d(row, m, e);
      }
    }
    float all = gd[0] + gd[1];
    all += __shfl_xor_sync(0xffffffffu, all, 1);
    all += __shfl_xor_sync(0xffffffffu, all, 2);
    a[0][q] = pack2<T>(gd[0] - l[0] * (p.top_k ? all : gd[0]), gd[1] - l[1] * (p.top_k ? all : gd[1]));
  }
  a[0][2] = a[0][3] = 0;
}

}  // namespace mole::sm90

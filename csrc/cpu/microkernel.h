// One register tile: acc [MR][NV vectors] = Σ_p a[i,p] · panel[p, ·]. Included by kernels.cpp only.
//
// The left operand is read where it lies (its rows are short-strided broadcasts that stay in L1); only the
// right one is packed. Measured on a Zen 4 core with panels in L2: 117 of ~118 GF fp32, 233 GF bf16.
#pragma once

#include "cpu/kernels.h"
#include "cpu/vectors.h"

namespace mole {
namespace MOLE_ISA {

// vectors a panel is wide, and rows a tile is high: accumulators + panel vectors + one broadcast fit the
// register file
#if MOLE_VECTOR_BYTES == 64
constexpr int kPanelVectors = 4;
constexpr int kTileRows[] = {0, 12, 12, 8, 6};
#else
constexpr int kPanelVectors = 2;
constexpr int kTileRows[] = {0, 8, 6};
#endif

template <class O>
struct Operand {
  using Wide = O;
  static constexpr int step = 1;

  template <int MR, int NV>
  static MOLE_INLINE void run(
      Vec<Wide> (&acc)[MR][NV], const O* a, int64_t a_row, int64_t a_k, const O* b, int64_t k) {
    constexpr int L = lanes<Wide>;
    for (int64_t p = 0; p < k; ++p) {
      Vec<Wide> bv[NV];
      MOLE_UNROLL
      for (int j = 0; j < NV; ++j) bv[j] = load(b + (p * NV + j) * L);
      MOLE_UNROLL
      for (int i = 0; i < MR; ++i) {
        const Vec<Wide> av = broadcast(a[i * a_row + p * a_k]);
        MOLE_UNROLL
        for (int j = 0; j < NV; ++j) acc[i][j] += av * bv[j];
      }
    }
  }
};

#if MOLE_ISA_AVX512BF16
template <>
struct Operand<bfloat> {
  using Wide = float;
  static constexpr int step = 2;

  template <int MR, int NV>
  static MOLE_INLINE void pair(
      Vec<float> (&acc)[MR][NV], const bfloat* a, int64_t a_row, const bfloat* b, int bytes) {
    __m512bh bv[NV];
    MOLE_UNROLL
    for (int j = 0; j < NV; ++j) bv[j] = (__m512bh)_mm512_loadu_si512(b + j * 32);
    MOLE_UNROLL
    for (int i = 0; i < MR; ++i) {
      int two = 0;
      if (bytes == 4)
        std::memcpy(&two, a + i * a_row, 4);
      else
        std::memcpy(&two, a + i * a_row, 2);
      const __m512bh av = (__m512bh)_mm512_set1_epi32(two);
      MOLE_UNROLL
      for (int j = 0; j < NV; ++j) acc[i][j] = (Vec<float>)_mm512_dpbf16_ps((__m512)acc[i][j], av, bv[j]);
    }
  }

  // a_k is the distance of two k; a pair (2p, 2p+1) always lies side by side
  template <int MR, int NV>
  static MOLE_INLINE void run(
      Vec<float> (&acc)[MR][NV], const bfloat* a, int64_t a_row, int64_t a_k, const bfloat* b, int64_t k) {
    int64_t p = 0;
    for (; p + 2 <= k; p += 2) pair<MR, NV>(acc, a + p * a_k, a_row, b + p * NV * 16, 4);
    // the element after the last is another row's, and NaN times the panel's zero would be NaN
    if (p < k) pair<MR, NV>(acc, a + p * a_k, a_row, b + p * NV * 16, 2);
  }
};
#endif

// where a tile's result goes: wide or elements, = or +=, rounded once
template <class T, class W>
struct Target {
  void* c;
  int64_t c_row;
  bool wide, accumulate;
  const W* bias;  // added to every row, or null

  MOLE_INLINE W* wide_at(int64_t row, int64_t col) const { return static_cast<W*>(c) + row * c_row + col; }
  MOLE_INLINE T* element_at(int64_t row, int64_t col) const { return static_cast<T*>(c) + row * c_row + col; }

  // one vector of the result, all lanes of it inside the matrix
  template <bool to_wide_c, bool add>
  MOLE_INLINE void put_vector(Vec<W> v, int64_t row, int64_t col) const {
    constexpr int L = lanes<W>;
    if constexpr (to_wide_c) {
      W* out = wide_at(row, col);
      store(out, add ? Vec<W>(load(out) + v) : v);
    } else {
      T* out = element_at(row, col);
      W values[L];
      if (add) {
        widen_row<T, W>(out, values, L);
        v += load(values);
      }
      store(values, v);
      narrow_row<T, W>(values, out, L);
    }
  }

  template <bool to_wide_c, bool add, int MR, int NV>
  MOLE_INLINE void put_all(const Vec<W> (&acc)[MR][NV], int64_t row, int64_t col) const {
    MOLE_UNROLL
    for (int i = 0; i < MR; ++i) {
      MOLE_UNROLL
      for (int j = 0; j < NV; ++j) put_vector<to_wide_c, add>(acc[i][j], row + i, col + j * lanes<W>);
    }
  }

  // the first n columns of a tile at the right edge: not worth its own copy of the code
  __attribute__((noinline)) void put_some(const W* values, int64_t row, int64_t col, int64_t n) const {
    for (int64_t i = 0; i < n; ++i) {
      if (wide)
        *wide_at(row, col + i) = accumulate ? *wide_at(row, col + i) + values[i] : values[i];
      else
        *element_at(row, col + i) =
            from_wide<T>(accumulate ? to_wide(*element_at(row, col + i)) + values[i] : values[i]);
    }
  }

  template <int MR, int NV>
  MOLE_INLINE void put(const Vec<W> (&acc)[MR][NV], int64_t row, int64_t col, int64_t n) const {
    constexpr int L = lanes<W>;
    if (n < NV * L) {
      W values[MR][NV * L];
      MOLE_UNROLL
      for (int i = 0; i < MR; ++i) {
        MOLE_UNROLL
        for (int j = 0; j < NV; ++j) store(values[i] + j * L, acc[i][j]);
      }
      for (int i = 0; i < MR; ++i) put_some(values[i], row + i, col, n);
    } else if (wide) {
      if (accumulate)
        put_all<true, true>(acc, row, col);
      else
        put_all<true, false>(acc, row, col);
    } else {
      if (accumulate)
        put_all<false, true>(acc, row, col);
      else
        put_all<false, false>(acc, row, col);
    }
  }
};

template <class T, class O, int MR, int NV>
__attribute__((noinline)) void tile(const Product* products,
                                    int count,
                                    int64_t row,
                                    int64_t col,
                                    int64_t cols,
                                    const Target<T, typename Operand<O>::Wide>& target) {
  using W = typename Operand<O>::Wide;
  constexpr int step = Operand<O>::step;
  Vec<W> acc[MR][NV];
  MOLE_UNROLL
  for (int j = 0; j < NV; ++j) {
    const Vec<W> first = target.bias ? load(target.bias + col + j * lanes<W>) : Vec<W>{};
    MOLE_UNROLL
    for (int i = 0; i < MR; ++i) acc[i][j] = first;
  }
  for (int s = 0; s < count; ++s) {
    const Product& p = products[s];
    const int64_t padded = (p.k + step - 1) / step * step;
    const O* a = static_cast<const O*>(p.a) + row * p.a_row;
    const O* b = static_cast<const O*>(p.panels) + col * padded;
    Operand<O>::template run<MR, NV>(acc, a, p.a_row, p.a_k, b, p.k);
  }
  target.put(acc, row, col, cols - col);
}

// the rows that are left of a panel, in one tile of just their number
template <class T, class O, int MR, int NV>
MOLE_INLINE void last_tile(const Product* products,
                           int count,
                           int64_t rows,
                           int64_t row,
                           int64_t col,
                           int64_t cols,
                           const Target<T, typename Operand<O>::Wide>& target) {
  if constexpr (MR > 0) {
    if (rows == MR)
      tile<T, O, MR, NV>(products, count, row, col, cols, target);
    else
      last_tile<T, O, MR - 1, NV>(products, count, rows, row, col, cols, target);
  }
}

template <class T, class O, int NV>
void panel(const Product* products,
           int count,
           int64_t rows,
           int64_t col,
           int64_t cols,
           const Target<T, typename Operand<O>::Wide>& target) {
  constexpr int MR = kTileRows[NV];
  int64_t i = 0;
  for (; i + MR <= rows; i += MR) tile<T, O, MR, NV>(products, count, i, col, cols, target);
  last_tile<T, O, MR - 1, NV>(products, count, rows - i, i, col, cols, target);
}

template <class T, class O>
void tiles(const Product* products,
           int count,
           int64_t rows,
           int64_t cols,
           const Target<T, typename Operand<O>::Wide>& target) {
  constexpr int64_t L = lanes<typename Operand<O>::Wide>;
  for (int64_t col = 0; col < cols; col += kPanelVectors * L) {
    const int64_t vectors = (cols - col + L - 1) / L;
    if (vectors >= kPanelVectors)
      panel<T, O, kPanelVectors>(products, count, rows, col, cols, target);
    else if (vectors == 1)
      panel<T, O, 1>(products, count, rows, col, cols, target);
#if MOLE_VECTOR_BYTES == 64
    else if (vectors == 2)
      panel<T, O, 2>(products, count, rows, col, cols, target);
    else
      panel<T, O, 3>(products, count, rows, col, cols, target);
#endif
  }
}

}  // namespace MOLE_ISA
}  // namespace mole

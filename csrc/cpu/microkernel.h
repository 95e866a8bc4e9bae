// One register tile: acc [MR][NV vectors] = Σ_p a[i,p] · panel[p, ·]. Included by kernels.cpp only.
//
// The left operand is read where it lies (its rows are short-strided broadcasts that stay in L1); only the right one is packed.
// Measured on a Zen 4 core with panels in L2: 117 of ~118 GF fp32, 233 GF bf16.
#pragma once

#include "cpu/kernels.h"
#include "cpu/vectors.h"

namespace mole {
namespace MOLE_ISA {

// vectors a panel is wide, and rows a tile is high: accumulators + panel vectors + one broadcast fit the register file
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
  static MOLE_INLINE void run(Vec<Wide> (&acc)[MR][NV], const O* a, int64_t a_row, int64_t a_k, const O* b, int64_t k) {
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
  static MOLE_INLINE void pair(Vec<float> (&acc)[MR][NV], const bfloat* a, int64_t a_row, const bfloat* b, int bytes) {
    __m512bh bv[NV];
    MOLE_UNROLL
    for (int j = 0; j < NV; ++j) bv[j] = (__m512bh)_mm512_loadu_si512(b + j * 32);
    MOLE_UNROLL
    for (int i = 0; i < MR; ++i) {
      int two = 0;
      if (bytes == 4) std::memcpy(&two, a + i * a_row, 4);
      else std::memcpy(&two, a + i * a_row, 2);
      const __m512bh av = (__m512bh)_mm512_set1_epi32(two);
      MOLE_UNROLL
      for (int j = 0; j < NV; ++j) acc[i][j] = (Vec<float>)_mm512_dpbf16_ps((__m512)acc[i][j], av, bv[j]);
    }
  }

  // a_k is the distance of two k; a pair (2p, 2p+1) always lies side by side
  template <int MR, int NV>
  static MOLE_INLINE void run(Vec<float> (&acc)[MR][NV], const bfloat* a, int64_t a_row, int64_t a_k, const bfloat* b, int64_t k) {
    int64_t p = 0;
    for (; p + 2 <= k; p += 2) pair<MR, NV>(acc, a + p * a_k, a_row, b + p * NV * 16, 4);
    // the element after the last is another row's, and NaN times the panel's zero would be NaN
    if (p < k) pair<MR, NV>(acc, a + p * a_k, a_row, b + p * NV * 16, 2);
  }
};
#endif

// where a tile's result goes: wide (= or +=), or elements (+=, rounded once)
template <class T, class W>
struct Target {
  void* c;
  int64_t c_row;
  bool wide, accumulate;

  MOLE_INLINE W* wide_at(int64_t row, int64_t col) const { return static_cast<W*>(c) + row * c_row + col; }
  MOLE_INLINE T* element_at(int64_t row, int64_t col) const { return static_cast<T*>(c) + row * c_row + col; }

  static MOLE_INLINE void add_elements(T* out, Vec<W> acc) {
    constexpr int L = lanes<W>;
    W values[L];
    widen_row<T, W>(out, values, L);
    store(values, Vec<W>(load(values) + acc));
    narrow_row<T, W>(values, out, L);
  }

  // n < L: the last columns of a matrix, or anything not worth its own copy of the code
  __attribute__((noinline)) void put_some(const W* values, int64_t row, int64_t col, int64_t n) const {
    for (int64_t i = 0; i < n; ++i) {
      if (wide) *wide_at(row, col + i) = accumulate ? *wide_at(row, col + i) + values[i] : values[i];
      else *element_at(row, col + i) = from_wide<T>(to_wide(*element_at(row, col + i)) + values[i]);
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
    } else if (!wide) {
      MOLE_UNROLL
      for (int i = 0; i < MR; ++i) {
        MOLE_UNROLL
        for (int j = 0; j < NV; ++j) add_elements(element_at(row + i, col + j * L), acc[i][j]);
      }
    } else if (accumulate) {
      MOLE_UNROLL
      for (int i = 0; i < MR; ++i) {
        MOLE_UNROLL
        for (int j = 0; j < NV; ++j) store(wide_at(row + i, col + j * L), Vec<W>(load(wide_at(row + i, col + j * L)) + acc[i][j]));
      }
    } else {
      MOLE_UNROLL
      for (int i = 0; i < MR; ++i) {
        MOLE_UNROLL
        for (int j = 0; j < NV; ++j) store(wide_at(row + i, col + j * L), acc[i][j]);
      }
    }
  }
};

template <class T, class O, int MR, int NV>
__attribute__((noinline)) void tile(const Product* products, int count, int64_t row, int64_t col, int64_t cols,
                                    const Target<T, typename Operand<O>::Wide>& target) {
  using W = typename Operand<O>::Wide;
  constexpr int step = Operand<O>::step;
  Vec<W> acc[MR][NV];
  MOLE_UNROLL
  for (int i = 0; i < MR; ++i) {
    MOLE_UNROLL
    for (int j = 0; j < NV; ++j) acc[i][j] = Vec<W>{};
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

// all rows of one panel; leftover rows in tiles of 4, 2 and 1
template <class T, class O, int NV>
void panel(const Product* products, int count, int64_t rows, int64_t col, int64_t cols, const Target<T, typename Operand<O>::Wide>& target) {
  constexpr int MR = kTileRows[NV];
  int64_t i = 0;
  for (; i + MR <= rows; i += MR) tile<T, O, MR, NV>(products, count, i, col, cols, target);
  for (; i + 4 <= rows; i += 4) tile<T, O, 4, NV>(products, count, i, col, cols, target);
  if (i + 2 <= rows) tile<T, O, 2, NV>(products, count, i, col, cols, target), i += 2;
  if (i < rows) tile<T, O, 1, NV>(products, count, i, col, cols, target);
}

template <class T, class O>
void multiply(const Product* products, int count, int64_t rows, int64_t cols, const Target<T, typename Operand<O>::Wide>& target) {
  constexpr int64_t L = lanes<typename Operand<O>::Wide>;
  for (int64_t col = 0; col < cols; col += kPanelVectors * L) {
    const int64_t vectors = (cols - col + L - 1) / L;
    if (vectors >= kPanelVectors) panel<T, O, kPanelVectors>(products, count, rows, col, cols, target);
    else if (vectors == 1) panel<T, O, 1>(products, count, rows, col, cols, target);
#if MOLE_VECTOR_BYTES == 64
    else if (vectors == 2) panel<T, O, 2>(products, count, rows, col, cols, target);
    else panel<T, O, 3>(products, count, rows, col, cols, target);
#endif
  }
}

}  // namespace MOLE_ISA
}  // namespace mole

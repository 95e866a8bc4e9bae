// Matrices packed into panels of the width that the microkernel reads, for one instruction set.
#pragma once

#include "cpu/kernels.h"
#include "cpu/microkernel.h"
#include "cpu/vectors.h"

namespace mole {
namespace MOLE_ISA {

template <class T>
struct OperandOf {
  using type = float;
};
template <>
struct OperandOf<double> {
  using type = double;
};
#if MOLE_ISA_AVX512BF16
template <>
struct OperandOf<bfloat> {
  using type = bfloat;
};
#endif

template <class A, class B>
constexpr bool same = false;
template <class A>
constexpr bool same<A, A> = true;

template <class T>
struct Packing {
  using O = typename OperandOf<T>::type;
  using W = typename Operand<O>::Wide;
  static constexpr int L = lanes<W>;
  static constexpr int step = Operand<O>::step;
  static constexpr int64_t panel_cols = kPanelVectors * L;
  // one step of k of one column: a wide number, or a pair of bfloat16 seen as one
  using Cell = W;

  static int64_t padded(int64_t k) { return (k + step - 1) / step * step; }
  static int64_t panel_size(int64_t k, int64_t cols) { return padded(k) * ((cols + L - 1) / L * L); }

  static MOLE_INLINE O operand(T v) {
    if constexpr (same<T, O>)
      return v;
    else
      return O(to_wide(v));
  }

  // b[p,c] for a step of p, zero beyond k
  static MOLE_INLINE void cell(const T* b, int64_t b_k, int64_t p, int64_t k, O* out) {
    for (int s = 0; s < step; ++s) out[s] = p + s < k ? operand(b[(p + s) * b_k]) : O{};
  }

  // L columns whose k lie side by side: blocks of L steps, transposed in registers
  static int64_t pack_transposed(const T* b, int64_t b_col, int64_t k, O* out, int64_t out_step) {
    int64_t p = 0;
    for (; p + L * step <= k; p += L * step) {
      Vec<W> r[L];
      MOLE_UNROLL
      for (int c = 0; c < L; ++c) {
        O line[L * step];
        const T* from = b + c * b_col + p;
        if constexpr (same<T, O>)
          std::memcpy(line, from, sizeof line);
        else
          widen_row<T, W>(from, line, L);
        std::memcpy(&r[c], line, sizeof line);
      }
      transpose(r);
      MOLE_UNROLL
      for (int s = 0; s < L; ++s) std::memcpy(out + (p / step + s) * out_step, &r[s], sizeof r[s]);
    }
    return p;
  }

  static void pack(const void* source, int64_t b_k, int64_t b_col, int64_t k, int64_t cols, void* panels) {
    const T* b = static_cast<const T*>(source);
    for (int64_t col = 0; col < cols; col += panel_cols) {
      const int64_t left = cols - col, vectors = left >= panel_cols ? kPanelVectors : (left + L - 1) / L;
      O* out = static_cast<O*>(panels) + col * padded(k);
      const int64_t out_step = vectors * L * step, whole = left / L < vectors ? left / L : vectors;
      int64_t done = 0;
      if (b_col == 1) done = pack_rows(b + col, b_k, k, whole, out, out_step);
      for (int64_t v = 0; v < vectors; ++v) {
        const T* from = b + (col + v * L) * b_col;
        const int64_t n = v < whole ? L : left - v * L;
        int64_t p = v < whole ? done : 0;
        if (v < whole && b_k == 1) p = pack_transposed(from, b_col, k, out + v * L * step, out_step);
        for (; p < k; p += step) {
          O* at = out + v * L * step + p / step * out_step;
          for (int64_t c = 0; c < L; ++c) {
            if (c < n)
              cell(from + c * b_col, b_k, p, k, at + c * step);
            else
              for (int s = 0; s < step; ++s) at[c * step + s] = O{};
          }
        }
      }
    }
  }

  // whole vectors of columns that lie side by side in b
  static int64_t pack_rows(const T* b, int64_t b_k, int64_t k, int64_t vectors, O* out, int64_t out_step) {
    int64_t p = 0;
    for (; p + step <= k; p += step)
      for (int64_t v = 0; v < vectors; ++v) {
        O* at = out + p / step * out_step + v * L * step;
        const T* from = b + p * b_k + v * L;
        if constexpr (step == 2)
          pair_rows(from, from + b_k, at);
        else if constexpr (same<T, O>)
          std::memcpy(at, from, L * sizeof(O));
        else
          widen_row<T, W>(from, at, L);
      }
    return p;
  }

  // L elements of two rows, interleaved
  static MOLE_INLINE void pair_rows(const O* one, const O* two, O* out) {
#if MOLE_ISA_AVX512BF16
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(one)));
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(two)));
    _mm512_storeu_si512(out, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
#endif
  }

  static void to_operand(const void* source,
                         int64_t a_row,
                         int64_t a_k,
                         int64_t rows,
                         int64_t k,
                         void* target,
                         int64_t out_row) {
    const T* a = static_cast<const T*>(source);
    O* out = static_cast<O*>(target);
    if (a_k == 1) {
      for (int64_t i = 0; i < rows; ++i) {
        if constexpr (same<T, O>)
          std::memcpy(out + i * out_row, a + i * a_row, k * sizeof(O));
        else
          widen_row<T, W>(a + i * a_row, out + i * out_row, k);
      }
      return;
    }
    // rows of 16 k at a time keep both sides within a few cache lines
    for (int64_t p0 = 0; p0 < k; p0 += 16) {
      const int64_t p1 = p0 + 16 < k ? p0 + 16 : k;
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t p = p0; p < p1; ++p) out[i * out_row + p] = operand(a[i * a_row + p * a_k]);
    }
  }

  static void transposed(
      const void* wide, int64_t wide_row, int64_t k, int64_t rows, void* target, Product* p) {
    p->k = k;
    if constexpr (same<O, W>) {
      p->a = wide, p->a_row = 1, p->a_k = wide_row;
    } else {
      const W* in = static_cast<const W*>(wide);
      O* out = static_cast<O*>(target);
      for (int64_t q = 0; q < k; q += 2) {
        const W *one = in + q * wide_row, *two = one + wide_row;
        O* at = out + q * rows;
        for (int64_t i = 0; i < rows; ++i)
          at[2 * i] = from_wide<O>(one[i]), at[2 * i + 1] = q + 1 < k ? from_wide<O>(two[i]) : O{};
      }
      p->a = out, p->a_row = 2, p->a_k = rows;
    }
  }
};

}  // namespace MOLE_ISA
}  // namespace mole

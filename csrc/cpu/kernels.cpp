// The kernels of one instruction set (see kernels.h); compiled once for each.
#include "cpu/kernels.h"

#include "cpu/microkernel.h"
#include "cpu/packing.h"
#include "cpu/vectors.h"

namespace mole {
namespace MOLE_ISA {

template <class T>
struct Of : Packing<T> {
  using Base = Packing<T>;
  using Base::L;
  using Base::operand;
  using Base::pack;
  using Base::padded;
  using Base::panel_cols;
  using Base::panel_size;
  using Base::step;
  using Base::to_operand;
  using Base::transposed;
  using typename Base::O;
  using typename Base::W;

  static void multiply_wide(const Product* products,
                            int count,
                            int64_t rows,
                            int64_t cols,
                            void* c,
                            int64_t c_row,
                            bool accumulate) {
    tiles<T, O>(products, count, rows, cols, Target<T, W>{c, c_row, true, accumulate, nullptr});
  }
  static void multiply(const Product* products,
                       int count,
                       int64_t rows,
                       int64_t cols,
                       void* c,
                       int64_t c_row,
                       bool accumulate,
                       const void* bias) {
    tiles<T, O>(products, count, rows, cols,
                Target<T, W>{c, c_row, same<T, W>, accumulate, static_cast<const W*>(bias)});
  }

  // L accumulators: L/2 rows times two experts, summed across lanes by one transposition
  static void row_dots(const void* source,
                       int64_t a_row,
                       int64_t rows,
                       int64_t k,
                       const void* token_weight_,
                       int64_t token_row,
                       int64_t experts,
                       void* logits_,
                       bool accumulate) {
    constexpr int R = L / 2;
    const O *a = static_cast<const O*>(source), *token_weight = static_cast<const O*>(token_weight_);
    W* logits = static_cast<W*>(logits_);
    for (int64_t i = 0; i < rows; i += R)
      for (int64_t e = 0; e < experts; e += 2) {
        const O* line[R];
        for (int64_t j = 0; j < R; ++j) line[j] = a + (i + j < rows ? i + j : rows - 1) * a_row;
        const O *one = token_weight + e * token_row,
                *two = token_weight + (e + 1 < experts ? e + 1 : e) * token_row;
        W sums[L];
        store(sums, dots<R>(line, one, two, k));
        for (int64_t j = 0; j < R && i + j < rows; ++j)
          for (int64_t f = 0; f < 2 && e + f < experts; ++f) {
            W& at = logits[(i + j) * experts + e + f];
            at = accumulate ? at + sums[2 * j + f] : sums[2 * j + f];
          }
      }
  }

  template <int R>
  static MOLE_INLINE Vec<W> dots(const O* const (&line)[R], const O* one, const O* two, int64_t k) {
    Vec<W> acc[L];
    MOLE_UNROLL
    for (int j = 0; j < L; ++j) acc[j] = Vec<W>{};
    int64_t p = 0;
    for (; p + L * step <= k; p += L * step) {
      MOLE_UNROLL
      for (int j = 0; j < R; ++j) {
        acc[2 * j] = fma(acc[2 * j], line[j] + p, one + p);
        acc[2 * j + 1] = fma(acc[2 * j + 1], line[j] + p, two + p);
      }
    }
    if (p < k) {
      for (int j = 0; j < R; ++j) {
        W s = 0, t = 0;
        for (int64_t q = p; q < k; ++q)
          s += to_wide(line[j][q]) * to_wide(one[q]), t += to_wide(line[j][q]) * to_wide(two[q]);
        // NOLINTNEXTLINE(clang-analyzer-core.uninitialized.Assign): all of acc is zeroed above; the analyser
        // does not follow lanes of vectors
        acc[2 * j][0] += s, acc[2 * j + 1][0] += t;
      }
    }
    transpose(acc);
    MOLE_UNROLL
    for (int n = L / 2; n > 0; n /= 2)
      for (int j = 0; j < n; ++j) acc[j] += acc[j + n];
    return acc[0];
  }

  static MOLE_INLINE Vec<W> fma(Vec<W> acc, const O* x, const O* y) {
#if MOLE_ISA_AVX512BF16
    if constexpr (step == 2)
      return (Vec<W>)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_loadu_si512(x),
                                      (__m512bh)_mm512_loadu_si512(y));
    else
#endif
      return acc + load(x) * load(y);
  }

  static MOLE_INLINE void add_to_rows(W* v, int64_t rows, int64_t experts, const void* bias) {
    const W* b = static_cast<const W*>(bias);
    if (b)
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t e = 0; e < experts; ++e) v[i * experts + e] += b[e];
  }

  static void sigmoid(void* values, int64_t rows, int64_t experts, const void* bias) {
    W* v = static_cast<W*>(values);
    add_to_rows(v, rows, experts, bias);
    const int64_t n = rows * experts;
    if constexpr (same<W, double>) {
      for (int64_t i = 0; i < n; ++i) v[i] = 1 / (1 + __builtin_exp(-v[i]));
    } else {
      for (int64_t i = 0; i < n; ++i) v[i] = 1 / (1 + exponential(-v[i]));
    }
  }

  // logits less their row's largest; all but the k largest become −inf
  static void shift_row(W* v, int64_t experts, int64_t k) {
    W most = -__builtin_inf(), nan = 0;
    for (int64_t e = 0; e < experts; ++e) {
      most = v[e] > most ? v[e] : most;
      nan = v[e] == v[e] ? nan : v[e];
    }
    if (nan != nan) most = nan;
    if (k < experts && most == most) {
      // (bound, at): the k-th in the order "larger first, of equal ones the earlier"
      W bound = __builtin_inf();
      int64_t at = -1;
      for (int64_t j = 0; j < k; ++j) {
        W best = 0;
        int64_t found = -1;
        for (int64_t e = 0; e < experts; ++e)
          if ((v[e] < bound || (v[e] == bound && e > at)) && (found < 0 || v[e] > best))
            best = v[e], found = e;
        bound = best, at = found;
      }
      for (int64_t e = 0; e < experts; ++e)
        if (v[e] < bound || (v[e] == bound && e > at)) v[e] = -__builtin_inf();
    }
    for (int64_t e = 0; e < experts; ++e) v[e] -= most;
  }

  static void softmax(void* values, int64_t rows, int64_t experts, const void* bias, int64_t k) {
    W* v = static_cast<W*>(values);
    add_to_rows(v, rows, experts, bias);
    for (int64_t i = 0; i < rows; ++i) shift_row(v + i * experts, experts, k);
    const int64_t n = rows * experts;
    if constexpr (same<W, double>) {
      for (int64_t i = 0; i < n; ++i) v[i] = __builtin_exp(v[i]);
    } else {
      for (int64_t i = 0; i < n; ++i) v[i] = v[i] < -87.0f ? 0.0f : exponential(v[i]);
    }
    for (int64_t i = 0; i < rows; ++i) {
      W sum = 0;
      for (int64_t e = 0; e < experts; ++e) sum += v[i * experts + e];
      for (int64_t e = 0; e < experts; ++e) v[i * experts + e] /= sum;
    }
  }

  // e^x to 2 ulp: x = n·ln2 + r, a degree-6 polynomial of r (Taylor's, |r| ≤ ln2/2), times 2^n; NaN stays NaN
  static MOLE_INLINE float exponential(float x) {
    x = x > 88.0f ? 88.0f : x;
    x = x < -87.0f ? -87.0f : x;
    const float n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float s = 1.0f / 5040;
    s = s * r + 1.0f / 720;
    s = s * r + 1.0f / 120;
    s = s * r + 1.0f / 24;
    s = s * r + 1.0f / 6;
    s = s * r + 0.5f;
    s = s * r + 1.0f;
    s = s * r + 1.0f;
    return s * bits_to_float(uint32_t(int32_t(n == n ? n : 0.0f) + 127) << 23);
  }

  static void gate(const void* h_,
                   int64_t h_row,
                   int64_t rows,
                   const RowGates& g,
                   const void* add_,
                   void* out,
                   int64_t out_row,
                   bool wide_out) {
    const W *h = static_cast<const W*>(h_), *add = static_cast<const W*>(add_);
    const W *scale = static_cast<const W*>(g.scale), *given = static_cast<const W*>(g.gate);
    const W *token = static_cast<const W*>(g.token), *sample = static_cast<const W*>(g.sample);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t e = 0; e < g.experts; ++e) {
        W gamma = scale[e];
        if (given) gamma *= given[i * g.gate_row + e * g.gate_e];
        if (token) gamma *= token[i * g.experts + e];
        if (sample) gamma *= sample[e];
        const int64_t from = g.starts[e], n = g.starts[e + 1] - from;
        const W *in = h + i * h_row + from, *plus = add ? add + from : nullptr;
        if (wide_out)
          scaled(in, gamma, plus, static_cast<W*>(out) + i * out_row + from, n);
        else
          scaled(in, gamma, plus, static_cast<O*>(out) + i * out_row + from, n);
      }
  }

  template <class To>
  static MOLE_INLINE void scaled(const W* in, W gamma, const W* add, To* out, int64_t n) {
    int64_t r = 0;
    for (; r + L <= n; r += L) {
      Vec<W> v = load(in + r) * gamma;
      if (add) v += load(add + r);
      if constexpr (same<To, W>) {
        store(out + r, v);
      } else {
        W line[L];
        store(line, v);
        narrow_row<To, W>(line, out + r, L);
      }
    }
    for (; r < n; ++r) out[r] = from_wide<To>(in[r] * gamma + (add ? add[r] : W(0)));
  }

  static void column_sums(const void* h_, int64_t h_row, int64_t rows, int64_t cols, void* sums_) {
    const W* h = static_cast<const W*>(h_);
    W* sums = static_cast<W*>(sums_);
    int64_t r = 0;
    for (; r + 4 * L <= cols; r += 4 * L) {
      Vec<W> s[4];
      MOLE_UNROLL
      for (int j = 0; j < 4; ++j) s[j] = load(sums + r + j * L);
      for (int64_t i = 0; i < rows; ++i) {
        MOLE_UNROLL
        for (int j = 0; j < 4; ++j) s[j] += load(h + i * h_row + r + j * L);
      }
      MOLE_UNROLL
      for (int j = 0; j < 4; ++j) store(sums + r + j * L, s[j]);
    }
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t c = r; c < cols; ++c) sums[c] += h[i * h_row + c];
  }

  static void expert_dots(const void* v_,
                          int64_t v_row,
                          const void* h_,
                          int64_t h_row,
                          int64_t rows,
                          const int64_t* starts,
                          int64_t experts,
                          void* d_) {
    const W *v = static_cast<const W*>(v_), *h = static_cast<const W*>(h_);
    W* d = static_cast<W*>(d_);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t e = 0; e < experts; ++e) {
        const W *x = v + i * v_row, *y = h + i * h_row;
        Vec<W> acc{};
        int64_t r = starts[e];
        for (; r + L <= starts[e + 1]; r += L) acc += load(x + r) * load(y + r);
        W sum = 0;
        for (int j = 0; j < L; ++j) sum += acc[j];
        for (; r < starts[e + 1]; ++r) sum += x[r] * y[r];
        d[i * experts + e] = sum;
      }
  }

  static void narrow(const void* in, int64_t in_row, int64_t rows, int64_t cols, void* out, int64_t out_row) {
    for (int64_t i = 0; i < rows; ++i)
      narrow_row<T, W>(static_cast<const W*>(in) + i * in_row, static_cast<T*>(out) + i * out_row, cols);
  }
  static void narrow_turned(
      const void* in_, int64_t in_row, int64_t rows, int64_t cols, void* out_, int64_t out_row) {
    const W* in = static_cast<const W*>(in_);
    T* out = static_cast<T*>(out_);
    for (int64_t r = 0; r < rows; r += L)
      for (int64_t c = 0; c < cols; c += L) {
        const int64_t high = rows - r < L ? rows - r : L, wide = cols - c < L ? cols - c : L;
        if (high == L && wide == L) {
          Vec<W> v[L];
          MOLE_UNROLL
          for (int i = 0; i < L; ++i) v[i] = load(in + (r + i) * in_row + c);
          transpose(v);
          W line[L][L];
          MOLE_UNROLL
          for (int i = 0; i < L; ++i) store(line[i], v[i]);
          for (int i = 0; i < L; ++i) narrow_row<T, W>(line[i], out + (c + i) * out_row + r, L);
        } else {
          for (int64_t i = 0; i < wide; ++i)
            for (int64_t j = 0; j < high; ++j)
              out[(c + i) * out_row + r + j] = from_wide<T>(in[(r + j) * in_row + c + i]);
        }
      }
  }
  static void widen(const void* in, int64_t in_row, int64_t rows, int64_t cols, void* out, int64_t out_row) {
    for (int64_t i = 0; i < rows; ++i)
      widen_row<T, W>(static_cast<const T*>(in) + i * in_row, static_cast<W*>(out) + i * out_row, cols);
  }

  static constexpr Kernels table{int64_t(sizeof(T)),
                                 int64_t(sizeof(O)),
                                 int64_t(sizeof(W)),
                                 kTileRows[kPanelVectors] * 2,
                                 panel_size,
                                 panel_cols,
                                 pack,
                                 to_operand,
                                 transposed,
                                 multiply_wide,
                                 multiply,
                                 row_dots,
                                 sigmoid,
                                 softmax,
                                 gate,
                                 column_sums,
                                 expert_dots,
                                 narrow,
                                 narrow_turned,
                                 widen};
};

const Kernels& table(Element type) {
  switch (type) {
    case F64:
      return Of<double>::table;
    case BF16:
      return Of<bfloat>::table;
    case F16:
      return Of<half>::table;
    default:
      return Of<float>::table;
  }
}

}  // namespace MOLE_ISA
}  // namespace mole

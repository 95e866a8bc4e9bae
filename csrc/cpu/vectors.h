// Vectors and scalar types of one instruction set, in the compiler's own vector syntax. Included by
// kernels.cpp only.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define MOLE_INLINE inline __attribute__((always_inline))
#define MOLE_UNROLL _Pragma("GCC unroll 16")

#if MOLE_ISA_AVX512 || MOLE_ISA_AVX512BF16
#define MOLE_VECTOR_BYTES 64
#elif MOLE_ISA_AVX2
#define MOLE_VECTOR_BYTES 32
#else
#define MOLE_VECTOR_BYTES 16
#endif

namespace mole {
namespace MOLE_ISA {

struct bfloat {
  uint16_t bits;
};
struct half {
  uint16_t bits;
};

template <class W>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(MOLE_VECTOR_BYTES)));
  typedef float loose __attribute__((vector_size(MOLE_VECTOR_BYTES), aligned(4), may_alias));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(MOLE_VECTOR_BYTES)));
  typedef double loose __attribute__((vector_size(MOLE_VECTOR_BYTES), aligned(8), may_alias));
};
template <class W>
using Vec = typename VectorOf<W>::type;
template <class W>
constexpr int lanes = MOLE_VECTOR_BYTES / int(sizeof(W));

template <class W>
MOLE_INLINE Vec<W> load(const W* p) {
  return *reinterpret_cast<const typename VectorOf<W>::loose*>(p);
}
template <class W>
MOLE_INLINE void store(W* p, Vec<W> v) {
  *reinterpret_cast<typename VectorOf<W>::loose*>(p) = v;
}
template <class W>
MOLE_INLINE Vec<W> broadcast(W s) {
  return s - Vec<W>{};  // not s + 0, which would turn -0 into 0
}

MOLE_INLINE float bits_to_float(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
MOLE_INLINE uint32_t float_to_bits(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return bits;
}

MOLE_INLINE float to_wide(float v) { return v; }
MOLE_INLINE double to_wide(double v) { return v; }
MOLE_INLINE float to_wide(bfloat v) { return bits_to_float(uint32_t(v.bits) << 16); }
MOLE_INLINE float to_wide(half v) {
#if defined(__F16C__)
  return _cvtsh_ss(v.bits);
#elif defined(__aarch64__)
  __fp16 h;
  std::memcpy(&h, &v.bits, 2);
  return h;
#else
  // exponent moved by a multiplication, so that subnormals come out right; Inf and NaN by hand
  const uint32_t sign = uint32_t(v.bits & 0x8000u) << 16, magnitude = uint32_t(v.bits & 0x7fffu) << 13;
  const float scaled = bits_to_float(magnitude) * bits_to_float(0x77800000u);
  return bits_to_float(sign |
                       ((v.bits & 0x7c00u) == 0x7c00u ? (magnitude | 0x7f800000u) : float_to_bits(scaled)));
#endif
}

template <class T>
MOLE_INLINE T from_wide(float v);
template <class T>
MOLE_INLINE T from_wide(double v);
template <>
MOLE_INLINE float from_wide<float>(float v) {
  return v;
}
template <>
MOLE_INLINE double from_wide<double>(double v) {
  return v;
}
template <>
MOLE_INLINE bfloat from_wide<bfloat>(float v) {
  const uint32_t bits = float_to_bits(v), rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return {uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40u : rounded)};
}
template <>
MOLE_INLINE half from_wide<half>(float v) {
#if defined(__F16C__)
  return {uint16_t(_cvtss_sh(v, 0))};
#elif defined(__aarch64__)
  const __fp16 h = __fp16(v);
  half out;
  std::memcpy(&out.bits, &h, 2);
  return out;
#else
  const uint32_t bits = float_to_bits(v), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {uint16_t(sign | 0x7e00u)};
  if (magnitude >= 0x47800000u) return {uint16_t(sign | 0x7c00u)};
  if (magnitude < 0x38800000u) {
    // subnormal: adding 0.5 lets the float adder round at the right bit
    const float shifted = bits_to_float(magnitude) + 0.5f;
    return {uint16_t(sign | (float_to_bits(shifted) - 0x3f000000u))};
  }
  const uint32_t odd = (magnitude >> 13) & 1u;
  return {uint16_t(sign | ((magnitude - 0x38000000u + 0xfffu + odd) >> 13))};
#endif
}

// n elements to wide and back; the fixed count lets whole vectors be converted at once
template <class T, class W>
MOLE_INLINE void widen_row(const T* in, W* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = to_wide(in[i]);
}
template <class T, class W>
MOLE_INLINE void narrow_row(const W* in, T* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = from_wide<T>(in[i]);
}
#if defined(__F16C__)
template <>
MOLE_INLINE void widen_row<half, float>(const half* in, float* out, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
  for (; i < n; ++i) out[i] = to_wide(in[i]);
}
template <>
MOLE_INLINE void narrow_row<half, float>(const float* in, half* out, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), _mm256_cvtps_ph(_mm256_loadu_ps(in + i), 0));
  for (; i < n; ++i) out[i] = from_wide<half>(in[i]);
}
#endif
#if MOLE_ISA_AVX512BF16
template <>
MOLE_INLINE void narrow_row<bfloat, float>(const float* in, bfloat* out, int64_t n) {
  // vcvtneps2bf16 flushes subnormals, which is within its rounding of zero
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const __m256bh v = _mm512_cvtneps_pbh(_mm512_loadu_ps(in + i));
    std::memcpy(out + i, &v, 32);
  }
  for (; i < n; ++i) out[i] = from_wide<bfloat>(in[i]);
}
#endif

// r[i][j] -> r[j][i]: log2(n) rounds of a perfect shuffle of the rows' halves
template <class V, int... I>
struct Interleave {
  static MOLE_INLINE V low(V a, V b) {
    return __builtin_shufflevector(a, b, (I / 2 + (I % 2) * int(sizeof...(I)))...);
  }
  static MOLE_INLINE V high(V a, V b) {
    return __builtin_shufflevector(a, b, (int(sizeof...(I)) / 2 + I / 2 + (I % 2) * int(sizeof...(I)))...);
  }
};
template <class V, int n>
struct Shuffle;
template <class V>
struct Shuffle<V, 2> : Interleave<V, 0, 1> {};
template <class V>
struct Shuffle<V, 4> : Interleave<V, 0, 1, 2, 3> {};
template <class V>
struct Shuffle<V, 8> : Interleave<V, 0, 1, 2, 3, 4, 5, 6, 7> {};
template <class V>
struct Shuffle<V, 16> : Interleave<V, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15> {};

template <class V, int n>
MOLE_INLINE void transpose(V (&r)[n]) {
  V t[n];
  MOLE_UNROLL
  for (int round = 1; round < n; round *= 2) {
    MOLE_UNROLL
    for (int i = 0; i < n / 2; ++i) {
      t[2 * i] = Shuffle<V, n>::low(r[i], r[i + n / 2]);
      t[2 * i + 1] = Shuffle<V, n>::high(r[i], r[i + n / 2]);
    }
    MOLE_UNROLL
    for (int i = 0; i < n; ++i) r[i] = t[i];
  }
}

}  // namespace MOLE_ISA
}  // namespace mole

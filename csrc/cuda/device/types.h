// 16-bit types as bits, and their conversions. Arithmetic is done in float.
#pragma once

#include "config.h"

namespace mole {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

// value -> float, exact
MOLE_DEVICE float to_float(bf16 v) {
#ifdef MOLE_EMULATE
  return emu::bf16_to_float(v.bits);
#else
  return __uint_as_float(uint32_t(v.bits) << 16);
#endif
}

// PTX ISA "Data Movement and Conversion Instructions: cvt" (cvt.f32.f16)
MOLE_DEVICE float to_float(fp16 v) {
#ifdef MOLE_EMULATE
  return emu::fp16_to_float(v.bits);
#else
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v.bits));
  return f;
#endif
}

// float -> T, rounded to nearest even. PTX ISA "cvt" (cvt.rn.bf16.f32, cvt.rn.f16.f32)
template <class T>
MOLE_DEVICE T from_float(float f);

template <>
MOLE_DEVICE bf16 from_float<bf16>(float f) {
#ifdef MOLE_EMULATE
  return {emu::float_to_bf16(f)};
#else
  bf16 v;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(v.bits) : "f"(f));
  return v;
#endif
}

template <>
MOLE_DEVICE fp16 from_float<fp16>(float f) {
#ifdef MOLE_EMULATE
  return {emu::float_to_fp16(f)};
#else
  fp16 v;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(v.bits) : "f"(f));
  return v;
#endif
}

// two values in one register, `low` in the low half (the element of lower index). PTX ISA "cvt"
// (cvt.rn.bf16x2.f32, cvt.rn.f16x2.f32)
template <class T>
MOLE_DEVICE uint32_t pack2(float low, float high);

template <>
MOLE_DEVICE uint32_t pack2<bf16>(float low, float high) {
#ifdef MOLE_EMULATE
  return uint32_t(emu::float_to_bf16(low)) | uint32_t(emu::float_to_bf16(high)) << 16;
#else
  uint32_t v;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
  return v;
#endif
}

template <>
MOLE_DEVICE uint32_t pack2<fp16>(float low, float high) {
#ifdef MOLE_EMULATE
  return uint32_t(emu::float_to_fp16(low)) | uint32_t(emu::float_to_fp16(high)) << 16;
#else
  uint32_t v;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
  return v;
#endif
}

// the two values of a packed register
template <class T>
MOLE_DEVICE float low_of(uint32_t v) {
  return to_float(T{uint16_t(v & 0xffffu)});
}
template <class T>
MOLE_DEVICE float high_of(uint32_t v) {
  return to_float(T{uint16_t(v >> 16)});
}

// 1/(1+e^-x) with the fast exponential and reciprocal. PTX ISA "Floating Point Instructions: ex2, rcp"
MOLE_DEVICE float sigmoid(float x) {
#ifdef MOLE_EMULATE
  return emu::sigmoid(x);
#else
  float e, r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(-1.4426950408889634f * x));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(1.0f + e));
  return r;
#endif
}

}  // namespace mole

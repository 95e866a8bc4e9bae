// wgmma: the warpgroup's asynchronous product, d[64×n] += a[64×16] b[16×n], 16-bit operands, float
// accumulators. PTX ISA "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Operation: wgmma.mma_async".
//
// Every thread of a warpgroup (128 threads, the first a multiple of 128) calls, with the same descriptors.
// Order of use:
//     wgmma_fence(d);  wgmma<T>(d, a, b) …;  wgmma_commit();  wgmma_wait<0>();  wgmma_hold(d);  … read d
// Between the first wgmma and the wait the accumulators are the hardware's: not to be read or written. Shared
// memory that a product in flight reads must not be written. Operands written by ordinary stores need
// fence_proxy_async_shared first; TMA's do not.
//
// Fragments, warp w of the warpgroup, g = lane/4, q = lane%4: d[4j + i] is row 16w + g + 8(i/2), column 8j +
// 2q + i%2. a (from registers) is laid out as mma_m16n8k16's: see mma.h.
#pragma once

#include "types.h"

namespace mole {

// how 16-byte pieces are permuted in shared memory; the values are the descriptor's and match the tensor
// map's swizzle of that width
enum class Swizzle : uint32_t { None = 0, B128 = 1, B64 = 2, B32 = 3 };

// which index of an operand runs fastest in shared memory: K, or M (of A) / N (of B)
enum class Major : int { K = 0, MN = 1 };

// bytes of the widest row a swizzle permutes within
MOLE_HOST_DEVICE constexpr uint32_t swizzle_bytes(Swizzle s) {
  return s == Swizzle::B128 ? 128u : s == Swizzle::B64 ? 64u : s == Swizzle::B32 ? 32u : 16u;
}

// where byte `offset` of an unswizzled tile lies in the swizzled one (the tile starts at a multiple of
// 8·swizzle_bytes). PTX ISA "Swizzling Modes"
template <Swizzle S>
MOLE_HOST_DEVICE constexpr uint32_t swizzled(uint32_t offset) {
  return S == Swizzle::None ? offset : offset ^ (((offset >> 7) & (swizzle_bytes(S) / 16 - 1)) << 4);
}

// matrix descriptor. PTX ISA "Asynchronous warpgroup-level matrix shared memory layout: Matrix Descriptor",
// "Strides".
//   K-major, swizzled: rows of swizzle_bytes, eight to a group; stride_bytes from one group of eight rows to
//   the next (8·swizzle_bytes
//     where dense), leading_bytes ignored. Step along K inside a row: add bytes>>4 to the descriptor.
//   K-major, unswizzled: 8 rows × 16 bytes in a run of 128; leading_bytes to the next 8 columns of K,
//   stride_bytes to the next 8 rows. MN-major, swizzled: rows (one per k) of swizzle_bytes along M or N;
//   stride_bytes to the next 8 of k, leading_bytes to the next
//     swizzle_bytes of M or N.
//   MN-major, unswizzled: 8 (k) × 16 bytes (8 of M or N) in a run of 128; stride_bytes to the next 8 of M or
//   N, leading_bytes to the
//     next 8 of k.
template <Swizzle S>
MOLE_DEVICE uint64_t wgmma_descriptor(const void* p, uint32_t leading_bytes, uint32_t stride_bytes) {
#ifdef MOLE_EMULATE
  const uint32_t address = emu::smem_address(p);
#else
  const uint32_t address = uint32_t(__cvta_generic_to_shared(p));
#endif
  return uint64_t((address & 0x3ffffu) >> 4) | uint64_t((leading_bytes & 0x3ffffu) >> 4) << 16 |
         uint64_t((stride_bytes & 0x3ffffu) >> 4) << 32 | uint64_t(S) << 62;
}

// the commonest: K-major, 64 elements of K to a row of 128 swizzled bytes, dense
MOLE_DEVICE uint64_t wgmma_descriptor_k128(const void* p) {
  return wgmma_descriptor<Swizzle::B128>(p, 16, 1024);
}

// a descriptor `bytes` further on (a multiple of 16)
MOLE_DEVICE uint64_t wgmma_advance(uint64_t descriptor, uint32_t bytes) { return descriptor + (bytes >> 4); }

// the compiler keeps d's reads and writes on their side of this line; costs nothing
template <int REGS>
MOLE_DEVICE void wgmma_hold(float (&d)[REGS]) {
#ifndef MOLE_EMULATE
#pragma unroll
  for (int i = 0; i < REGS; i++) asm volatile("" : "+f"(d[i])::"memory");
#else
  (void)d;
#endif
}

// before the first wgmma, and whenever registers it uses were written by anything but a wgmma of the same
// shape. PTX ISA "wgmma.fence"
MOLE_DEVICE void wgmma_fence() {
#ifdef MOLE_EMULATE
  emu::wgmma_fence();
#else
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
template <int REGS>
MOLE_DEVICE void wgmma_fence(float (&d)[REGS]) {
  wgmma_hold(d);
  wgmma_fence();
}

// close a group of products. PTX ISA "wgmma.commit_group"
MOLE_DEVICE void wgmma_commit() {
#ifdef MOLE_EMULATE
  emu::wgmma_commit();
#else
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// all but the last N groups are done: accumulators may be read, operands overwritten. PTX ISA
// "wgmma.wait_group"
template <int N>
MOLE_DEVICE void wgmma_wait() {
#ifdef MOLE_EMULATE
  emu::wgmma_wait(N);
#else
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
#endif
}

#ifdef MOLE_EMULATE

template <class T>
constexpr emu::Element wgmma_element = emu::kBf16;
template <>
inline constexpr emu::Element wgmma_element<fp16> = emu::kFp16;

template <class T, Major A = Major::K, Major B = Major::K, int REGS>
MOLE_DEVICE void wgmma(float (&d)[REGS], uint64_t a, uint64_t b, bool accumulate = true) {
  emu::wgmma(d, 2 * REGS, wgmma_element<T>, a, A == Major::MN, nullptr, b, B == Major::MN, accumulate);
}
template <class T, Major B = Major::K, int REGS>
MOLE_DEVICE void wgmma(float (&d)[REGS], const uint32_t (&a)[4], uint64_t b, bool accumulate = true) {
  emu::wgmma(d, 2 * REGS, wgmma_element<T>, 0, false, a, b, B == Major::MN, accumulate);
}

#else

template <int N, class T, int TA, int TB>
struct WgmmaShape;

// operands come first in the asm's numbering, so their places depend on n: 4 registers in each step of 8
// columns
#define MOLE_R1 "%0, %1, %2, %3"
#define MOLE_R2 MOLE_R1 ", %4, %5, %6, %7"
#define MOLE_R3 MOLE_R2 ", %8, %9, %10, %11"
#define MOLE_R4 MOLE_R3 ", %12, %13, %14, %15"
#define MOLE_R5 MOLE_R4 ", %16, %17, %18, %19"
#define MOLE_R6 MOLE_R5 ", %20, %21, %22, %23"
#define MOLE_R7 MOLE_R6 ", %24, %25, %26, %27"
#define MOLE_R8 MOLE_R7 ", %28, %29, %30, %31"
#define MOLE_R9 MOLE_R8 ", %32, %33, %34, %35"
#define MOLE_R10 MOLE_R9 ", %36, %37, %38, %39"
#define MOLE_R11 MOLE_R10 ", %40, %41, %42, %43"
#define MOLE_R12 MOLE_R11 ", %44, %45, %46, %47"
#define MOLE_R13 MOLE_R12 ", %48, %49, %50, %51"
#define MOLE_R14 MOLE_R13 ", %52, %53, %54, %55"
#define MOLE_R15 MOLE_R14 ", %56, %57, %58, %59"
#define MOLE_R16 MOLE_R15 ", %60, %61, %62, %63"
#define MOLE_R17 MOLE_R16 ", %64, %65, %66, %67"
#define MOLE_R18 MOLE_R17 ", %68, %69, %70, %71"
#define MOLE_R19 MOLE_R18 ", %72, %73, %74, %75"
#define MOLE_R20 MOLE_R19 ", %76, %77, %78, %79"
#define MOLE_R21 MOLE_R20 ", %80, %81, %82, %83"
#define MOLE_R22 MOLE_R21 ", %84, %85, %86, %87"
#define MOLE_R23 MOLE_R22 ", %88, %89, %90, %91"
#define MOLE_R24 MOLE_R23 ", %92, %93, %94, %95"
#define MOLE_R25 MOLE_R24 ", %96, %97, %98, %99"
#define MOLE_R26 MOLE_R25 ", %100, %101, %102, %103"
#define MOLE_R27 MOLE_R26 ", %104, %105, %106, %107"
#define MOLE_R28 MOLE_R27 ", %108, %109, %110, %111"
#define MOLE_R29 MOLE_R28 ", %112, %113, %114, %115"
#define MOLE_R30 MOLE_R29 ", %116, %117, %118, %119"
#define MOLE_R31 MOLE_R30 ", %120, %121, %122, %123"
#define MOLE_R32 MOLE_R31 ", %124, %125, %126, %127"
#define MOLE_D(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define MOLE_D1 MOLE_D(0)
#define MOLE_D2 MOLE_D1, MOLE_D(4)
#define MOLE_D3 MOLE_D2, MOLE_D(8)
#define MOLE_D4 MOLE_D3, MOLE_D(12)
#define MOLE_D5 MOLE_D4, MOLE_D(16)
#define MOLE_D6 MOLE_D5, MOLE_D(20)
#define MOLE_D7 MOLE_D6, MOLE_D(24)
#define MOLE_D8 MOLE_D7, MOLE_D(28)
#define MOLE_D9 MOLE_D8, MOLE_D(32)
#define MOLE_D10 MOLE_D9, MOLE_D(36)
#define MOLE_D11 MOLE_D10, MOLE_D(40)
#define MOLE_D12 MOLE_D11, MOLE_D(44)
#define MOLE_D13 MOLE_D12, MOLE_D(48)
#define MOLE_D14 MOLE_D13, MOLE_D(52)
#define MOLE_D15 MOLE_D14, MOLE_D(56)
#define MOLE_D16 MOLE_D15, MOLE_D(60)
#define MOLE_D17 MOLE_D16, MOLE_D(64)
#define MOLE_D18 MOLE_D17, MOLE_D(68)
#define MOLE_D19 MOLE_D18, MOLE_D(72)
#define MOLE_D20 MOLE_D19, MOLE_D(76)
#define MOLE_D21 MOLE_D20, MOLE_D(80)
#define MOLE_D22 MOLE_D21, MOLE_D(84)
#define MOLE_D23 MOLE_D22, MOLE_D(88)
#define MOLE_D24 MOLE_D23, MOLE_D(92)
#define MOLE_D25 MOLE_D24, MOLE_D(96)
#define MOLE_D26 MOLE_D25, MOLE_D(100)
#define MOLE_D27 MOLE_D26, MOLE_D(104)
#define MOLE_D28 MOLE_D27, MOLE_D(108)
#define MOLE_D29 MOLE_D28, MOLE_D(112)
#define MOLE_D30 MOLE_D29, MOLE_D(116)
#define MOLE_D31 MOLE_D30, MOLE_D(120)
#define MOLE_D32 MOLE_D31, MOLE_D(124)

#define MOLE_WGMMA(N, CPP, PTX, S, I0, I1, I2, I3, I4, I5, I6)                                             \
  template <int TA, int TB>                                                                                \
  struct WgmmaShape<N, CPP, TA, TB> {                                                                      \
    static __device__ __forceinline__ void shared(float (&d)[N / 2],                                       \
                                                  uint64_t a,                                              \
                                                  uint64_t b,                                              \
                                                  int accumulate) {                                        \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #I2 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N   \
                   "k16.f32." PTX "." PTX " {" MOLE_R##S "}, %" #I0 ", %" #I1 ", p, 1, 1, %" #I3 ", %" #I4 \
                                                         ";\n}\n"                                          \
                   : MOLE_D##S                                                                             \
                   : "l"(a), "l"(b), "r"(accumulate), "n"(TA), "n"(TB));                                   \
    }                                                                                                      \
    static __device__ __forceinline__ void registers(float (&d)[N / 2],                                    \
                                                     const uint32_t (&a)[4],                               \
                                                     uint64_t b,                                           \
                                                     int accumulate) {                                     \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #I5 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N   \
                   "k16.f32." PTX "." PTX " {" MOLE_R##S "}, {%" #I0 ", %" #I1 ", %" #I2 ", %" #I3         \
                                                         "}, %" #I4 ", p, 1, 1, %" #I6 ";\n}\n"            \
                   : MOLE_D##S                                                                             \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(TB));        \
    }                                                                                                      \
  };
#define MOLE_WGMMA_BOTH(N, S, I0, I1, I2, I3, I4, I5, I6)    \
  MOLE_WGMMA(N, bf16, "bf16", S, I0, I1, I2, I3, I4, I5, I6) \
  MOLE_WGMMA(N, fp16, "f16", S, I0, I1, I2, I3, I4, I5, I6)

MOLE_WGMMA_BOTH(8, 1, 4, 5, 6, 7, 8, 9, 10)
MOLE_WGMMA_BOTH(16, 2, 8, 9, 10, 11, 12, 13, 14)
MOLE_WGMMA_BOTH(24, 3, 12, 13, 14, 15, 16, 17, 18)
MOLE_WGMMA_BOTH(32, 4, 16, 17, 18, 19, 20, 21, 22)
MOLE_WGMMA_BOTH(40, 5, 20, 21, 22, 23, 24, 25, 26)
MOLE_WGMMA_BOTH(48, 6, 24, 25, 26, 27, 28, 29, 30)
MOLE_WGMMA_BOTH(56, 7, 28, 29, 30, 31, 32, 33, 34)
MOLE_WGMMA_BOTH(64, 8, 32, 33, 34, 35, 36, 37, 38)
MOLE_WGMMA_BOTH(72, 9, 36, 37, 38, 39, 40, 41, 42)
MOLE_WGMMA_BOTH(80, 10, 40, 41, 42, 43, 44, 45, 46)
MOLE_WGMMA_BOTH(88, 11, 44, 45, 46, 47, 48, 49, 50)
MOLE_WGMMA_BOTH(96, 12, 48, 49, 50, 51, 52, 53, 54)
MOLE_WGMMA_BOTH(104, 13, 52, 53, 54, 55, 56, 57, 58)
MOLE_WGMMA_BOTH(112, 14, 56, 57, 58, 59, 60, 61, 62)
MOLE_WGMMA_BOTH(120, 15, 60, 61, 62, 63, 64, 65, 66)
MOLE_WGMMA_BOTH(128, 16, 64, 65, 66, 67, 68, 69, 70)
MOLE_WGMMA_BOTH(136, 17, 68, 69, 70, 71, 72, 73, 74)
MOLE_WGMMA_BOTH(144, 18, 72, 73, 74, 75, 76, 77, 78)
MOLE_WGMMA_BOTH(152, 19, 76, 77, 78, 79, 80, 81, 82)
MOLE_WGMMA_BOTH(160, 20, 80, 81, 82, 83, 84, 85, 86)
MOLE_WGMMA_BOTH(168, 21, 84, 85, 86, 87, 88, 89, 90)
MOLE_WGMMA_BOTH(176, 22, 88, 89, 90, 91, 92, 93, 94)
MOLE_WGMMA_BOTH(184, 23, 92, 93, 94, 95, 96, 97, 98)
MOLE_WGMMA_BOTH(192, 24, 96, 97, 98, 99, 100, 101, 102)
MOLE_WGMMA_BOTH(200, 25, 100, 101, 102, 103, 104, 105, 106)
MOLE_WGMMA_BOTH(208, 26, 104, 105, 106, 107, 108, 109, 110)
MOLE_WGMMA_BOTH(216, 27, 108, 109, 110, 111, 112, 113, 114)
MOLE_WGMMA_BOTH(224, 28, 112, 113, 114, 115, 116, 117, 118)
MOLE_WGMMA_BOTH(232, 29, 116, 117, 118, 119, 120, 121, 122)
MOLE_WGMMA_BOTH(240, 30, 120, 121, 122, 123, 124, 125, 126)
MOLE_WGMMA_BOTH(248, 31, 124, 125, 126, 127, 128, 129, 130)
MOLE_WGMMA_BOTH(256, 32, 128, 129, 130, 131, 132, 133, 134)

#undef MOLE_WGMMA_BOTH
#undef MOLE_WGMMA

// d += a b with both operands in shared memory; n = 2·REGS, a multiple of 8 up to 256. accumulate = false
// overwrites d.
template <class T, Major A = Major::K, Major B = Major::K, int REGS>
MOLE_DEVICE void wgmma(float (&d)[REGS], uint64_t a, uint64_t b, bool accumulate = true) {
  static_assert(REGS % 4 == 0 && REGS >= 4 && REGS <= 128,
                "wgmma: n = 2·REGS is a multiple of 8 from 8 to 256");
  WgmmaShape<2 * REGS, T, int(A), int(B)>::shared(d, a, b, accumulate);
}

// d += a b with a in registers (16 rows of each warp)
template <class T, Major B = Major::K, int REGS>
MOLE_DEVICE void wgmma(float (&d)[REGS], const uint32_t (&a)[4], uint64_t b, bool accumulate = true) {
  static_assert(REGS % 4 == 0 && REGS >= 4 && REGS <= 128,
                "wgmma: n = 2·REGS is a multiple of 8 from 8 to 256");
  WgmmaShape<2 * REGS, T, 0, int(B)>::registers(d, a, b, accumulate);
}

#endif

}  // namespace mole

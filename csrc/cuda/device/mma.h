// The portable tensor-core path (sm_80 and later): mma.sync, ldmatrix, stmatrix (sm_90), cp.async.
#pragma once

#include "types.h"

namespace mole {

// d += a b for a 16×16, b 16×8 (column-major), d 16×8 float; every lane of the warp calls.
// With g = lane/4, q = lane%4: a[0] row g, columns 2q, 2q+1; a[1] row g+8; a[2] row g, columns 2q+8…; a[3]
// row g+8, columns 2q+8…; b[0] rows 2q, 2q+1 of column g, b[1] rows 2q+8…; d[0..1] row g, columns 2q, 2q+1,
// d[2..3] row g+8. PTX ISA "Warp Level Matrix Multiply-Accumulate: mma.m16n8k16"
template <class T>
MOLE_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

#ifdef MOLE_EMULATE
template <>
MOLE_DEVICE void mma_m16n8k16<bf16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emu::mma_m16n8k16(d, a, b, emu::kBf16);
}
template <>
MOLE_DEVICE void mma_m16n8k16<fp16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emu::mma_m16n8k16(d, a, b, emu::kFp16);
}
#else
#define MOLE_MMA_16816(CPP, PTX)                                                                      \
  template <>                                                                                         \
  MOLE_DEVICE void mma_m16n8k16<CPP>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." PTX "." PTX                                 \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"               \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                     \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                 \
  }
MOLE_MMA_16816(bf16, "bf16")
MOLE_MMA_16816(fp16, "f16")
#undef MOLE_MMA_16816
#endif

// four 8×8 matrices of 16-bit elements: lane l gives the address (16-byte aligned) of row l%8 of matrix l/8;
// r[i] holds row lane/4, columns 2(lane%4), 2(lane%4)+1 of matrix i. PTX ISA "ldmatrix"
MOLE_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
#ifdef MOLE_EMULATE
  emu::ldmatrix(r, 4, row, false);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(uint32_t(__cvta_generic_to_shared(row)))
               : "memory");
#endif
}

// the same, each matrix transposed: r[i] holds column lane/4. PTX ISA "ldmatrix" (.trans)
MOLE_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
#ifdef MOLE_EMULATE
  emu::ldmatrix(r, 4, row, true);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(uint32_t(__cvta_generic_to_shared(row)))
               : "memory");
#endif
}

// two matrices; lanes 0…15 give the addresses
MOLE_DEVICE void ldmatrix_x2(uint32_t (&r)[2], const void* row) {
#ifdef MOLE_EMULATE
  emu::ldmatrix(r, 2, row, false);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(uint32_t(__cvta_generic_to_shared(row)))
               : "memory");
#endif
}

MOLE_DEVICE void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row) {
#ifdef MOLE_EMULATE
  emu::ldmatrix(r, 2, row, true);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(uint32_t(__cvta_generic_to_shared(row)))
               : "memory");
#endif
}

// 16 bytes global -> shared, later; only the first `valid` (0…16) are read, the rest is zero. Both addresses
// 16-byte aligned. PTX ISA "cp.async" (.cg)
MOLE_DEVICE void cp_async_16(void* dst, const void* src, int valid = 16) {
#ifdef MOLE_EMULATE
  emu::cp_async_16(dst, src, valid);
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(uint32_t(__cvta_generic_to_shared(dst))),
               "l"(src), "r"(valid)
               : "memory");
#endif
}

// PTX ISA "cp.async.commit_group"
MOLE_DEVICE void cp_async_commit() {
#ifdef MOLE_EMULATE
  emu::cp_async_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// all but the last N groups of this thread have landed, for this thread. PTX ISA "cp.async.wait_group"
template <int N>
MOLE_DEVICE void cp_async_wait() {
#ifdef MOLE_EMULATE
  emu::cp_async_wait(N);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

#if defined(MOLE_EMULATE) || !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
// the inverse of ldmatrix_x4, registers -> shared memory. PTX ISA "stmatrix" (sm_90)
MOLE_DEVICE void stmatrix_x4(void* row, const uint32_t (&r)[4]) {
#ifdef MOLE_EMULATE
  emu::stmatrix(row, r, 4, false);
#else
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                   uint32_t(__cvta_generic_to_shared(row))),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
#endif
}

MOLE_DEVICE void stmatrix_x4_trans(void* row, const uint32_t (&r)[4]) {
#ifdef MOLE_EMULATE
  emu::stmatrix(row, r, 4, true);
#else
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                   uint32_t(__cvta_generic_to_shared(row))),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
#endif
}
#endif

}  // namespace mole

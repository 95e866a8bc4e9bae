// Fences, atomics with their memory order, and global accesses that say how they cache.
// Scope is .gpu throughout: these are for flags and counters between CTAs. PTX ISA "Memory Consistency
// Model".
#pragma once

#include "config.h"

namespace mole {

// earlier ordinary accesses of this thread become visible to later asynchronous ones (TMA, wgmma) of threads
// that synchronise with it. By the writing threads, before the barrier. PTX ISA "membar / fence"
// (fence.proxy.async), "Async proxy"
MOLE_DEVICE void fence_proxy_async() {
#ifdef MOLE_EMULATE
  emu::fence_proxy_async(emu::kShared | emu::kGlobal);
#else
  asm volatile("fence.proxy.async;" ::: "memory");
#endif
}

// the same for shared memory alone: the cheaper one
MOLE_DEVICE void fence_proxy_async_shared() {
#ifdef MOLE_EMULATE
  emu::fence_proxy_async(emu::kShared);
#else
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// the same for global memory alone
MOLE_DEVICE void fence_proxy_async_global() {
#ifdef MOLE_EMULATE
  emu::fence_proxy_async(emu::kGlobal);
#else
  asm volatile("fence.proxy.async.global;" ::: "memory");
#endif
}

// earlier accesses before later ones, for threads of the whole GPU. PTX ISA "membar / fence"
// (fence.acq_rel.gpu)
MOLE_DEVICE void fence_acq_rel_gpu() {
#ifdef MOLE_EMULATE
  emu::thread_fence();
#else
  asm volatile("fence.acq_rel.gpu;" ::: "memory");
#endif
}

// PTX ISA "ld" (ld.acquire.gpu, ld.relaxed.gpu)
MOLE_DEVICE uint32_t load_acquire(const uint32_t* p) {
#ifdef MOLE_EMULATE
  return emu::atomic_load(p, emu::kAcquire);
#else
  uint32_t v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
#endif
}

MOLE_DEVICE uint32_t load_relaxed(const uint32_t* p) {
#ifdef MOLE_EMULATE
  return emu::atomic_load(p, emu::kRelaxed);
#else
  uint32_t v;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
#endif
}

// PTX ISA "st" (st.release.gpu, st.relaxed.gpu)
MOLE_DEVICE void store_release(uint32_t* p, uint32_t v) {
#ifdef MOLE_EMULATE
  emu::atomic_store(p, v, emu::kRelease);
#else
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
#endif
}

MOLE_DEVICE void store_relaxed(uint32_t* p, uint32_t v) {
#ifdef MOLE_EMULATE
  emu::atomic_store(p, v, emu::kRelaxed);
#else
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
#endif
}

// add, giving what was there. PTX ISA "atom" (atom.{relaxed,release,acq_rel}.gpu.add)
MOLE_DEVICE uint32_t atomic_add_relaxed(uint32_t* p, uint32_t v) {
#ifdef MOLE_EMULATE
  return emu::atomic_add(p, v, emu::kRelaxed);
#else
  uint32_t old;
  asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(v) : "memory");
  return old;
#endif
}

MOLE_DEVICE uint32_t atomic_add_release(uint32_t* p, uint32_t v) {
#ifdef MOLE_EMULATE
  return emu::atomic_add(p, v, emu::kRelease);
#else
  uint32_t old;
  asm volatile("atom.release.gpu.global.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(v) : "memory");
  return old;
#endif
}

MOLE_DEVICE uint32_t atomic_add_acq_rel(uint32_t* p, uint32_t v) {
#ifdef MOLE_EMULATE
  return emu::atomic_add(p, v, emu::kAcqRel);
#else
  uint32_t old;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(v) : "memory");
  return old;
#endif
}

// add without an answer. PTX ISA "red" (red.release.gpu.add, red.relaxed.gpu.add)
MOLE_DEVICE void reduce_add_release(uint32_t* p, uint32_t v) {
#ifdef MOLE_EMULATE
  emu::atomic_add(p, v, emu::kRelease);
#else
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
#endif
}

MOLE_DEVICE void reduce_add_relaxed(uint32_t* p, uint32_t v) {
#ifdef MOLE_EMULATE
  emu::atomic_add(p, v, emu::kRelaxed);
#else
  asm volatile("red.relaxed.gpu.global.add.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
#endif
}

MOLE_DEVICE void reduce_add_relaxed(float* p, float v) {
#ifdef MOLE_EMULATE
  emu::atomic_add(p, v, emu::kRelaxed);
#else
  asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(p), "f"(v) : "memory");
#endif
}

// compare and swap, giving what was there. PTX ISA "atom" (atom.acq_rel.gpu.cas)
MOLE_DEVICE uint32_t atomic_cas_acq_rel(uint32_t* p, uint32_t expected, uint32_t desired) {
#ifdef MOLE_EMULATE
  return emu::atomic_cas(p, expected, desired, emu::kAcqRel);
#else
  uint32_t old;
  asm volatile("atom.acq_rel.gpu.global.cas.b32 %0, [%1], %2, %3;"
               : "=r"(old)
               : "l"(p), "r"(expected), "r"(desired)
               : "memory");
  return old;
#endif
}

// 16 bytes of memory that nobody writes while the kernel runs; p is 16-byte aligned. PTX ISA "ld.global.nc"
MOLE_DEVICE uint4 load16_readonly(const void* p) {
#ifdef MOLE_EMULATE
  return emu::load16(p);
#else
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
#endif
}

}  // namespace mole

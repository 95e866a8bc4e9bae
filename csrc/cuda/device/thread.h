// Threads, warps, shared memory addresses, named barriers, register budgets, dependent launches.
//
// As in CUDA, in both worlds: threadIdx, blockIdx, blockDim, gridDim, __syncthreads, __syncwarp, __shfl_sync,
// __shfl_xor_sync,
// __shfl_down_sync, __ballot_sync, __any_sync, __all_sync, __threadfence, __nanosleep.
#pragma once

#include "config.h"

namespace mole {

// dynamic shared memory of this CTA, 1024-byte aligned (what a 128-byte swizzle wants). There is no static
// shared memory: the emulator could not tell one CTA's from another's.
MOLE_DEVICE unsigned char* dynamic_smem() {
#ifdef MOLE_EMULATE
  return emu::dynamic_smem();
#else
  extern __shared__ __align__(1024) unsigned char mole_dynamic_smem[];
  return mole_dynamic_smem;
#endif
}

// generic pointer -> address in the shared::cta window. PTX ISA "cvta"
MOLE_DEVICE uint32_t smem_address(const void* p) {
#ifdef MOLE_EMULATE
  return emu::smem_address(p);
#else
  return uint32_t(__cvta_generic_to_shared(p));
#endif
}

MOLE_DEVICE int lane_id() { return int(threadIdx.x & 31u); }

// index of this warp in its CTA, uniform to the compiler. The CTA is one-dimensional. Every lane must call.
MOLE_DEVICE int warp_id() { return __shfl_sync(0xffffffffu, int(threadIdx.x >> 5), 0); }

// true in exactly one lane of the warp, which one is the hardware's choice; every lane must call. PTX ISA
// "elect.sync"
MOLE_DEVICE bool elect_one() {
#ifdef MOLE_EMULATE
  return emu::elect_one();
#else
  uint32_t chosen;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}\n" : "=r"(chosen));
  return chosen != 0;
#endif
}

// wait until `threads` threads (a multiple of 32) have come to barrier `id` (1…15; 0 is __syncthreads) by
// sync or arrive; orders their memory accesses. PTX ISA "barrier{.cta}" (bar.sync)
MOLE_DEVICE void named_barrier_sync(int id, int threads) {
#ifdef MOLE_EMULATE
  emu::named_barrier_sync(id, threads);
#else
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

// come to barrier `id` and go on; orders this thread's earlier accesses before those of the threads that
// sync. PTX ISA "bar.arrive"
MOLE_DEVICE void named_barrier_arrive(int id, int threads) {
#ifdef MOLE_EMULATE
  emu::named_barrier_arrive(id, threads);
#else
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

// give registers back to the CTA's pool, down to N each (multiple of 8, 24…256). Every warp of the warpgroup
// calls. PTX ISA "Miscellaneous Instructions: setmaxnreg". Kernel needs __launch_bounds__(threads, 1).
template <int N>
MOLE_DEVICE void registers_decrease() {
  static_assert(N % 8 == 0 && N >= 24 && N <= 256, "setmaxnreg takes a multiple of 8 from 24 to 256");
#ifdef MOLE_EMULATE
  emu::set_registers(N, false);
#else
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
#endif
}

// take registers from the pool, up to N each; waits until there are enough
template <int N>
MOLE_DEVICE void registers_increase() {
  static_assert(N % 8 == 0 && N >= 24 && N <= 256, "setmaxnreg takes a multiple of 8 from 24 to 256");
#ifdef MOLE_EMULATE
  emu::set_registers(N, true);
#else
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
#endif
}

// wait for the kernels this one depends on (programmatic dependent launch). PTX ISA "Parallel Synchronization
// … : griddepcontrol"
MOLE_DEVICE void griddep_wait() {
#ifdef MOLE_EMULATE
  emu::griddep_wait();
#else
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// let the kernels that depend on this one start. PTX ISA "griddepcontrol"
MOLE_DEVICE void griddep_launch_dependents() {
#ifdef MOLE_EMULATE
  emu::griddep_launch_dependents();
#else
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// cannot be reached; ends the grid with an error if it is
MOLE_DEVICE void trap() {
#ifdef MOLE_EMULATE
  emu::trap();
#else
  asm volatile("trap;");
#endif
}

}  // namespace mole

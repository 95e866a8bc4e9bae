// mbarrier: a barrier in shared memory that counts arrivals and bytes of asynchronous copies.
// PTX ISA "Parallel Synchronization and Communication Instructions: mbarrier".
//
// A barrier is 8 bytes of shared memory, 8-byte aligned. Its phase ends when `count` arrivals have come and
// all expected bytes are there. A wait names the parity of the phase it waits for: 0 for the first. On a
// fresh barrier a wait for parity 1 passes.
#pragma once

#include "config.h"

namespace mole {

// one thread, before anyone uses it; count 1…2^20-1. PTX ISA "mbarrier.init"
MOLE_DEVICE void mbarrier_init(uint64_t* bar, uint32_t count) {
#ifdef MOLE_EMULATE
  emu::mbarrier_init(bar, count);
#else
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(uint32_t(__cvta_generic_to_shared(bar))),
               "r"(count)
               : "memory");
#endif
}

// the 8 bytes are ordinary memory again. PTX ISA "mbarrier.inval"
MOLE_DEVICE void mbarrier_invalidate(uint64_t* bar) {
#ifdef MOLE_EMULATE
  emu::mbarrier_invalidate(bar);
#else
  asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(uint32_t(__cvta_generic_to_shared(bar)))
               : "memory");
#endif
}

// makes this thread's mbarrier_init visible to TMA and to the cluster; then __syncthreads or a cluster
// barrier. PTX ISA "membar / fence" (fence.mbarrier_init)
MOLE_DEVICE void fence_mbarrier_init() {
#ifdef MOLE_EMULATE
  emu::fence_mbarrier_init();
#else
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

// one arrival; orders this thread's earlier accesses before those of whoever waits. PTX ISA "mbarrier.arrive"
MOLE_DEVICE void mbarrier_arrive(uint64_t* bar) {
#ifdef MOLE_EMULATE
  emu::mbarrier_arrive(bar, 1);
#else
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(uint32_t(__cvta_generic_to_shared(bar)))
               : "memory");
#endif
}

// this phase will see `bytes` more; no arrival. PTX ISA "mbarrier.expect_tx"
MOLE_DEVICE void mbarrier_expect_tx(uint64_t* bar, uint32_t bytes) {
#ifdef MOLE_EMULATE
  emu::mbarrier_expect_tx(bar, bytes);
#else
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(
                   uint32_t(__cvta_generic_to_shared(bar))),
               "r"(bytes)
               : "memory");
#endif
}

// expect `bytes`, then one arrival. PTX ISA "mbarrier.arrive" (.expect_tx)
MOLE_DEVICE void mbarrier_arrive_expect_tx(uint64_t* bar, uint32_t bytes) {
#ifdef MOLE_EMULATE
  emu::mbarrier_arrive_expect_tx(bar, bytes);
#else
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(uint32_t(__cvta_generic_to_shared(bar))),
      "r"(bytes)
      : "memory");
#endif
}

// has the phase of this parity ended? May wait a while before it says no. PTX ISA "mbarrier.test_wait /
// mbarrier.try_wait"
MOLE_DEVICE bool mbarrier_try_wait(uint64_t* bar, uint32_t parity) {
#ifdef MOLE_EMULATE
  return emu::mbarrier_try_wait(bar, parity, emu::kCtaScope);
#else
  uint32_t done;
  asm volatile(
      "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}\n"
      : "=r"(done)
      : "r"(uint32_t(__cvta_generic_to_shared(bar))), "r"(parity)
      : "memory");
  return done != 0;
#endif
}

// wait for the end of the phase of this parity; what was done before its arrivals, and the copies it counted,
// are visible then. For arrivals of this CTA and for TMA. PTX ISA "mbarrier.try_wait" (.acquire.cta)
MOLE_DEVICE void mbarrier_wait(uint64_t* bar, uint32_t parity) {
#ifdef MOLE_EMULATE
  emu::mbarrier_wait(bar, parity, emu::kCtaScope);
#else
  while (!mbarrier_try_wait(bar, parity)) {
  }
#endif
}

// the same where arrivals come from other CTAs of the cluster and announce ordinary accesses (st_cluster,
// reads of shared memory that a peer will overwrite). PTX ISA "mbarrier.try_wait" (.acquire.cluster)
MOLE_DEVICE void mbarrier_wait_cluster(uint64_t* bar, uint32_t parity) {
#ifdef MOLE_EMULATE
  emu::mbarrier_wait(bar, parity, emu::kClusterScope);
#else
  uint32_t done;
  do {
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\nselp.u32 "
        "%0, 1, 0, p;\n}\n"
        : "=r"(done)
        : "r"(uint32_t(__cvta_generic_to_shared(bar))), "r"(parity)
        : "memory");
  } while (!done);
#endif
}

// the same where peers' arrivals say that they have read shared memory which asynchronous copies issued next
// will overwrite, and nothing else: a multicast pipeline's free stages. The wait of .cta scope: .cluster's
// also empties the L1 cache (CCTL.IVALL in SASS), for ordinary data that this use does not have. PTX ISA
// "mbarrier.try_wait"
MOLE_DEVICE void mbarrier_wait_freed(uint64_t* bar, uint32_t parity) {
#ifdef MOLE_EMULATE
  emu::mbarrier_wait(bar, parity, emu::kFreed);
#else
  while (!mbarrier_try_wait(bar, parity)) {
  }
#endif
}

// one arrival at the barrier of CTA `rank` that lies where `bar` lies here. PTX ISA "mbarrier.arrive"
// (.release.cluster, .shared::cluster)
MOLE_DEVICE void mbarrier_arrive_remote(uint64_t* bar, uint32_t rank) {
#ifdef MOLE_EMULATE
  emu::mbarrier_arrive_remote(bar, rank);
#else
  asm volatile(
      "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote];\n}\n" ::"r"(
          uint32_t(__cvta_generic_to_shared(bar))),
      "r"(rank)
      : "memory");
#endif
}

// one arrival at the barrier of CTA `rank`, which says that this warp has read a stage that asynchronous
// copies will overwrite, and nothing else: it publishes no ordinary store, so it wants no fence. With
// .release.cluster the same arrival compiles to MEMBAR.ALL.GPU and waits for the L2 in every step of the main
// loop. Its waiter is mbarrier_wait_freed. PTX ISA "mbarrier.arrive" (.shared::cluster; default .release of
// .cta scope)
MOLE_DEVICE void mbarrier_arrive_freed(uint64_t* bar, uint32_t rank) {
#ifdef MOLE_EMULATE
  emu::mbarrier_arrive_freed(bar, rank);
#else
  asm volatile(
      "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}\n" ::"r"(uint32_t(__cvta_generic_to_shared(bar))),
      "r"(rank)
      : "memory");
#endif
}

// expect `bytes` at the barrier of CTA `rank`, then one arrival there. PTX ISA "mbarrier.arrive" (.expect_tx,
// .shared::cluster)
MOLE_DEVICE void mbarrier_arrive_expect_tx_remote(uint64_t* bar, uint32_t rank, uint32_t bytes) {
#ifdef MOLE_EMULATE
  emu::mbarrier_arrive_expect_tx_remote(bar, rank, bytes);
#else
  asm volatile(
      "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.expect_tx.release.cluster.shared::cluster.b64 _, [remote], %2;\n}\n" ::"r"(
          uint32_t(__cvta_generic_to_shared(bar))),
      "r"(rank), "r"(bytes)
      : "memory");
#endif
}

// one arrival (of those the count names) once all earlier cp.async of this thread are done. PTX ISA
// "cp.async.mbarrier.arrive" (.noinc)
MOLE_DEVICE void mbarrier_arrive_after_cp_async(uint64_t* bar) {
#ifdef MOLE_EMULATE
  emu::mbarrier_arrive_after_cp_async(bar);
#else
  asm volatile(
      "cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(uint32_t(__cvta_generic_to_shared(bar)))
      : "memory");
#endif
}

}  // namespace mole

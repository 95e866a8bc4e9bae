// Thread block clusters and distributed shared memory.
// A remote address is what cluster_map gives: a number in the shared::cluster window, not a pointer.
#pragma once

#include "config.h"

namespace mole {

// rank of this CTA in its cluster, and how many there are. PTX ISA "Special Registers: %cluster_ctarank,
// %cluster_nctarank"
MOLE_DEVICE uint32_t cluster_rank() {
#ifdef MOLE_EMULATE
  return emu::cluster_rank();
#else
  uint32_t r;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
#endif
}

MOLE_DEVICE uint32_t cluster_size() {
#ifdef MOLE_EMULATE
  return emu::cluster_size();
#else
  uint32_t n;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(n));
  return n;
#endif
}

// every thread of every CTA of the cluster arrives, then waits; orders their accesses. PTX ISA
// "barrier.cluster" (.release, .acquire)
MOLE_DEVICE void cluster_arrive() {
#ifdef MOLE_EMULATE
  emu::cluster_arrive(emu::kRelease);
#else
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}

// arrive without ordering anything: enough after fence_mbarrier_init. PTX ISA "barrier.cluster.arrive"
// (.relaxed)
MOLE_DEVICE void cluster_arrive_relaxed() {
#ifdef MOLE_EMULATE
  emu::cluster_arrive(emu::kRelaxed);
#else
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}

MOLE_DEVICE void cluster_wait() {
#ifdef MOLE_EMULATE
  emu::cluster_wait();
#else
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

MOLE_DEVICE void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

// the address in CTA `rank` that lies where `p` lies here. PTX ISA "mapa"
MOLE_DEVICE uint32_t cluster_map(const void* p, uint32_t rank) {
#ifdef MOLE_EMULATE
  return emu::cluster_map(p, rank);
#else
  uint32_t a;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
               : "=r"(a)
               : "r"(uint32_t(__cvta_generic_to_shared(p))), "r"(rank));
  return a;
#endif
}

// ordinary stores into a peer's shared memory (generic proxy: fence_proxy_async before a wgmma reads them).
// PTX ISA "st" (.shared::cluster)
MOLE_DEVICE void st_cluster(uint32_t address, uint32_t v) {
#ifdef MOLE_EMULATE
  emu::st_cluster(address, &v, sizeof v);
#else
  asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(address), "r"(v) : "memory");
#endif
}

MOLE_DEVICE void st_cluster(uint32_t address, float v) {
#ifdef MOLE_EMULATE
  emu::st_cluster(address, &v, sizeof v);
#else
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(address), "f"(v) : "memory");
#endif
}

MOLE_DEVICE void st_cluster(uint32_t address, uint4 v) {
#ifdef MOLE_EMULATE
  emu::st_cluster(address, &v, sizeof v);
#else
  asm volatile("st.shared::cluster.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x), "r"(v.y),
               "r"(v.z), "r"(v.w)
               : "memory");
#endif
}

// ordinary loads from a peer's shared memory. PTX ISA "ld" (.shared::cluster)
MOLE_DEVICE uint32_t ld_cluster_u32(uint32_t address) {
#ifdef MOLE_EMULATE
  uint32_t v;
  emu::ld_cluster(address, &v, sizeof v);
  return v;
#else
  uint32_t v;
  asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
  return v;
#endif
}

MOLE_DEVICE float ld_cluster_f32(uint32_t address) {
#ifdef MOLE_EMULATE
  float v;
  emu::ld_cluster(address, &v, sizeof v);
  return v;
#else
  float v;
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(v) : "r"(address) : "memory");
  return v;
#endif
}

MOLE_DEVICE uint4 ld_cluster_16(uint32_t address) {
#ifdef MOLE_EMULATE
  uint4 v;
  emu::ld_cluster(address, &v, sizeof v);
  return v;
#else
  uint4 v;
  asm volatile("ld.shared::cluster.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
#endif
}

// a store that arrives later and then counts its bytes (4, 8, 16) at `bar`, a barrier of the same CTA as
// `address` (both from cluster_map). PTX ISA "Data Movement and Conversion Instructions: st.async" (generic
// proxy, as an ordinary store)
MOLE_DEVICE void st_async(uint32_t address, uint32_t v, uint32_t bar) {
#ifdef MOLE_EMULATE
  emu::st_async(address, &v, sizeof v, bar);
#else
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];" ::"r"(address), "r"(v),
      "r"(bar)
      : "memory");
#endif
}

MOLE_DEVICE void st_async(uint32_t address, uint2 v, uint32_t bar) {
#ifdef MOLE_EMULATE
  emu::st_async(address, &v, sizeof v, bar);
#else
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.u32 [%0], {%1, %2}, [%3];" ::"r"(
          address),
      "r"(v.x), "r"(v.y), "r"(bar)
      : "memory");
#endif
}

MOLE_DEVICE void st_async(uint32_t address, uint4 v, uint32_t bar) {
#ifdef MOLE_EMULATE
  emu::st_async(address, &v, sizeof v, bar);
#else
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.u32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
          address),
      "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(bar)
      : "memory");
#endif
}

}  // namespace mole

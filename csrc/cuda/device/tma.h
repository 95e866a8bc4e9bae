// Bulk asynchronous copies (TMA): tensor tiles and plain runs of bytes.
// PTX ISA "Data Movement and Conversion Instructions: Bulk copy (cp.async.bulk), Tensor copy
// (cp.async.bulk.tensor)".
//
// Coordinates are in elements, innermost first. A box that reaches over the tensor's edge is filled with
// zeros when loaded (all its bytes still count at the barrier) and cut when stored. Shared memory: 128-byte
// aligned; with the 128-byte swizzle 1024-byte aligned, 64: 512, 32: 256. One thread issues a copy; `map` is
// a __grid_constant__ kernel argument.
#pragma once

#include "config.h"

namespace mole {

// fetch the descriptor early. PTX ISA "prefetch" (.tensormap)
MOLE_DEVICE void tma_prefetch(const CUtensorMap* map) {
#ifdef MOLE_EMULATE
  emu::tma_prefetch(map);
#else
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
#endif
}

// how long a line should live in L2: for the copies below that take a policy. PTX ISA "createpolicy"
MOLE_DEVICE uint64_t policy_evict_first() {
#ifdef MOLE_EMULATE
  return 1;
#else
  uint64_t p;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(p));
  return p;
#endif
}

MOLE_DEVICE uint64_t policy_evict_last() {
#ifdef MOLE_EMULATE
  return 2;
#else
  uint64_t p;
  asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(p));
  return p;
#endif
}

// global tile -> shared memory of this CTA, counted at `bar`. PTX ISA "cp.async.bulk.tensor"
// (.shared::cluster.global.tile)
MOLE_DEVICE void tma_load_2d(void* dst, const CUtensorMap* map, uint64_t* bar, int x, int y) {
#ifdef MOLE_EMULATE
  emu::tma_load(dst, map, bar, 2, x, y, 0, 0);
#else
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, "
      "%4}], [%2];" ::"r"(uint32_t(__cvta_generic_to_shared(dst))),
      "l"(map), "r"(uint32_t(__cvta_generic_to_shared(bar))), "r"(x), "r"(y)
      : "memory");
#endif
}

MOLE_DEVICE void tma_load_2d(
    void* dst, const CUtensorMap* map, uint64_t* bar, int x, int y, uint64_t policy) {
#ifdef MOLE_EMULATE
  (void)policy;
  emu::tma_load(dst, map, bar, 2, x, y, 0, 0);
#else
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
      "[%1, {%3, %4}], [%2], "
      "%5;" ::"r"(uint32_t(__cvta_generic_to_shared(dst))),
      "l"(map), "r"(uint32_t(__cvta_generic_to_shared(bar))), "r"(x), "r"(y), "l"(policy)
      : "memory");
#endif
}

MOLE_DEVICE void tma_load_3d(void* dst, const CUtensorMap* map, uint64_t* bar, int x, int y, int z) {
#ifdef MOLE_EMULATE
  emu::tma_load(dst, map, bar, 3, x, y, z, 0);
#else
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, "
      "%5}], [%2];" ::"r"(uint32_t(__cvta_generic_to_shared(dst))),
      "l"(map), "r"(uint32_t(__cvta_generic_to_shared(bar))), "r"(x), "r"(y), "r"(z)
      : "memory");
#endif
}

// the same tile to every CTA whose bit is set in `ctas`, at the same place, counted at each one's barrier at
// the same place. PTX ISA "cp.async.bulk.tensor" (.multicast::cluster)
MOLE_DEVICE void tma_load_2d_multicast(
    void* dst, const CUtensorMap* map, uint64_t* bar, int x, int y, uint16_t ctas) {
#ifdef MOLE_EMULATE
  emu::tma_load(dst, map, bar, 2, x, y, 0, ctas);
#else
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%3, %4}], [%2], "
      "%5;" ::"r"(uint32_t(__cvta_generic_to_shared(dst))),
      "l"(map), "r"(uint32_t(__cvta_generic_to_shared(bar))), "r"(x), "r"(y), "h"(ctas)
      : "memory");
#endif
}

MOLE_DEVICE void tma_load_3d_multicast(
    void* dst, const CUtensorMap* map, uint64_t* bar, int x, int y, int z, uint16_t ctas) {
#ifdef MOLE_EMULATE
  emu::tma_load(dst, map, bar, 3, x, y, z, ctas);
#else
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%3, %4, %5}], "
      "[%2], %6;" ::"r"(uint32_t(__cvta_generic_to_shared(dst))),
      "l"(map), "r"(uint32_t(__cvta_generic_to_shared(bar))), "r"(x), "r"(y), "r"(z), "h"(ctas)
      : "memory");
#endif
}

// shared memory -> global tile; belongs to the issuing thread's next bulk group. PTX ISA
// "cp.async.bulk.tensor" (.global.shared::cta)
MOLE_DEVICE void tma_store_2d(const CUtensorMap* map, const void* src, int x, int y) {
#ifdef MOLE_EMULATE
  emu::tma_store(map, src, 2, x, y, 0);
#else
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
               "r"(uint32_t(__cvta_generic_to_shared(src))), "r"(x), "r"(y)
               : "memory");
#endif
}

MOLE_DEVICE void tma_store_3d(const CUtensorMap* map, const void* src, int x, int y, int z) {
#ifdef MOLE_EMULATE
  emu::tma_store(map, src, 3, x, y, z);
#else
  asm volatile(
      "cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(map),
      "r"(uint32_t(__cvta_generic_to_shared(src))), "r"(x), "r"(y), "r"(z)
      : "memory");
#endif
}

// runs of bytes: addresses and size multiples of 16. PTX ISA "cp.async.bulk"
MOLE_DEVICE void bulk_load(void* dst, const void* src, uint32_t bytes, uint64_t* bar) {
#ifdef MOLE_EMULATE
  emu::bulk_load(dst, src, bytes, bar);
#else
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          uint32_t(__cvta_generic_to_shared(dst))),
      "l"(src), "r"(bytes), "r"(uint32_t(__cvta_generic_to_shared(bar)))
      : "memory");
#endif
}

MOLE_DEVICE void bulk_store(void* dst, const void* src, uint32_t bytes) {
#ifdef MOLE_EMULATE
  emu::bulk_store(dst, src, bytes);
#else
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(dst),
               "r"(uint32_t(__cvta_generic_to_shared(src))), "r"(bytes)
               : "memory");
#endif
}

// shared memory of this CTA -> `dst` in a peer's, counted at `bar` there (both from cluster_map). Reads `src`
// asynchronously: it may be overwritten only once the peer's barrier says the bytes are there. PTX ISA
// "cp.async.bulk" (.shared::cluster.shared::cta)
MOLE_DEVICE void bulk_copy_cluster(uint32_t dst, const void* src, uint32_t bytes, uint32_t bar) {
#ifdef MOLE_EMULATE
  emu::bulk_copy_cluster(dst, src, bytes, bar);
#else
  asm volatile(
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          dst),
      "r"(uint32_t(__cvta_generic_to_shared(src))), "r"(bytes), "r"(bar)
      : "memory");
#endif
}

// close this thread's bulk group. PTX ISA "cp.async.bulk.commit_group"
MOLE_DEVICE void bulk_commit() {
#ifdef MOLE_EMULATE
  emu::bulk_commit();
#else
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#endif
}

// all but the last N groups of this thread have read their shared memory: it may be reused. PTX ISA
// "cp.async.bulk.wait_group" (.read)
template <int N>
MOLE_DEVICE void bulk_wait_read() {
#ifdef MOLE_EMULATE
  emu::bulk_wait(N, true);
#else
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
#endif
}

// all but the last N groups of this thread are done: their writes are visible to it. PTX ISA
// "cp.async.bulk.wait_group"
template <int N>
MOLE_DEVICE void bulk_wait() {
#ifdef MOLE_EMULATE
  emu::bulk_wait(N, false);
#else
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(N) : "memory");
#endif
}

}  // namespace mole

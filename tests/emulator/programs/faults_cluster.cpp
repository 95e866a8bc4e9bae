// Distributed shared memory, in which fault=NAME plants one mistake. fault=none is right.
// Each CTA of a cluster of two makes half of h = x a ᵀ's columns as bf16, gives it to its peer in three ways
// (st_cluster, st_async, bulk_copy_cluster by thirds), x comes by multicast, and both multiply h [64,32] by
// their own w.
#include "csrc/cuda/device/device.h"
#include "faults.h"
#include "gemm.h"

namespace mole {

constexpr const char* kFaults[] = {"none",
                                   "no_first_sync",
                                   "no_last_sync",
                                   "cta_scope_wait",
                                   "no_proxy_fence",
                                   "early_copy",
                                   "foreign_barrier",
                                   "one_expects",
                                   "wrong_rank",
                                   "peer_pointer",
                                   "arrive_twice",
                                   "wait_without_arrive",
                                   "lane_not_arrived",
                                   "no_remote_arrival",
                                   "relaxed_without_fence",
                                   "remote_uninitialised",
                                   "misaligned_store",
                                   "out_of_bounds",
                                   "few_remote_bytes",
                                   "no_wait_for_peer",
                                   "source_reuse",
                                   "multicast_to_nobody",
                                   "late_store",
                                   "read_after_end",
                                   "no_freed_wait",
                                   "arrival_without_scope",
                                   "ordinary_after_freed",
                                   "no_second_fence"};

constexpr int ROWS = 64, WIDTH = 64;  // h: 64 rows of 64 columns, 128 bytes each, two CTAs of 32 columns

struct Shared {
  unsigned char *x, *h, *w, *stage;
  uint64_t *loaded, *stored, *copied, *freed;
};

__device__ Shared shared() {
  unsigned char* s = dynamic_smem();
  auto* bars = reinterpret_cast<uint64_t*>(s + 4 * 8192);
  return {s, s + 8192, s + 2 * 8192, s + 3 * 8192, bars, bars + 1, bars + 2, bars + 3};
}

// where the 16 bytes of row r, columns 8c… of h lie
__device__ uint32_t place(int r, int c) { return swizzled<Swizzle::B128>(uint32_t(r * 128 + c * 16)); }

__device__ uint4 make_piece(const Shared& l, int r, int c) {
  uint32_t v[4];
  for (int i = 0; i < 4; i++) {
    // a stand-in for a product that is exact in bf16: h[r, j] = x[r, j] times two
    const uint32_t two = *reinterpret_cast<const uint32_t*>(l.x + place(r, c) + 4 * i);
    v[i] = pack2<bf16>(2 * low_of<bf16>(two), 2 * high_of<bf16>(two));
  }
  return make_uint4(v[0], v[1], v[2], v[3]);
}

__device__ void begin(const Shared& l, const CUtensorMap* x, const CUtensorMap* w, int row0, int fault) {
  const uint32_t rank = cluster_rank();
  if (threadIdx.x == 0) {
    mbarrier_init(l.loaded, 1);
    if (fault != FAULT("remote_uninitialised") || rank == 0) mbarrier_init(l.stored, 2);
    mbarrier_init(l.copied, 1);
    mbarrier_init(l.freed, 2);
    if (fault != FAULT("relaxed_without_fence")) fence_mbarrier_init();
    mbarrier_arrive_expect_tx(l.loaded, fault == FAULT("one_expects") && rank ? 4096 : 8192 + 8192);
    mbarrier_arrive_expect_tx(l.copied, 16 * ROWS + (fault == FAULT("few_remote_bytes") ? 0 : 16 * ROWS));
  }
  if (fault == FAULT("arrive_twice")) cluster_arrive_relaxed();
  if (fault != FAULT("no_first_sync") && fault != FAULT("wait_without_arrive") &&
      !(fault == FAULT("lane_not_arrived") && threadIdx.x == 77))
    cluster_arrive_relaxed();
  if (fault != FAULT("no_first_sync")) cluster_wait();
  __syncthreads();
  if (threadIdx.x == 0) {
    // each CTA loads half of x's rows for both
    const uint16_t ctas = fault == FAULT("multicast_to_nobody") ? 6 : 3;
    tma_load_2d_multicast(l.x + rank * 4096, x, l.loaded, 0, row0 + int(rank) * 32, ctas);
    tma_load_2d(l.w, w, l.loaded, 0, int(rank) * 64);
  }
  mbarrier_wait(l.loaded, 0);
}

__device__ void exchange(const Shared& l, int fault) {
  const uint32_t rank = cluster_rank(), peer = fault == FAULT("wrong_rank") ? 2 : 1 - rank;
  const int t = int(threadIdx.x), r = t % 64;
  // columns 0, 1 of the CTA's four by ordinary remote stores, column 2 by st.async, column 3 in bulk
  const int first = int(rank) * 4, c = first + t / 64;
  const uint4 mine = make_piece(l, r, c);
  *reinterpret_cast<uint4*>(l.h + place(r, c)) = mine;
  uint32_t there = cluster_map(l.h, peer) + place(r, c);
  if (fault == FAULT("misaligned_store") && t == 3) there += 4;
  if (fault == FAULT("out_of_bounds") && t == 3) there += 65536;
  st_cluster(there, mine);
  if (fault == FAULT("peer_pointer") && t == 3)
    *reinterpret_cast<uint4*>(l.h + place(r, c) + (rank ? -262144 : 262144)) = mine;
  const int d = first + 2 + t / 64;
  const uint4 other = make_piece(l, r, d);
  *reinterpret_cast<uint4*>(l.h + place(r, d)) = other;
  if (t < 64) {
    st_async(cluster_map(l.h, peer) + place(r, d), other,
             cluster_map(l.copied, fault == FAULT("foreign_barrier") ? rank : peer));
  } else {
    *reinterpret_cast<uint4*>(l.stage + r * 16) = other;
  }
  if (fault != FAULT("no_proxy_fence")) fence_proxy_async_shared();
  if (fault != FAULT("early_copy")) __syncthreads();
  if (t == 0) {
    for (int i = 0; i < ROWS; i++)
      bulk_copy_cluster(cluster_map(l.h, peer) + place(i, first + 3), l.stage + i * 16, 16,
                        cluster_map(l.copied, peer));
    if (fault == FAULT("source_reuse")) *reinterpret_cast<uint32_t*>(l.stage) = 0;
    // two arrivals at each CTA: its own and its peer's, for what the barrier above has gathered
    mbarrier_arrive(l.stored);
    if (fault == FAULT("arrival_without_scope"))
      mbarrier_arrive_freed(l.stored, peer);
    else if (fault != FAULT("no_remote_arrival"))
      mbarrier_arrive_remote(l.stored, peer);
  }
}

// x once more, over what both CTAs have read: a stage of a multicast pipeline is free when both have said so
__device__ void reload(const Shared& l, const CUtensorMap* x, int row0, int fault) {
  const uint32_t rank = cluster_rank();
  if (threadIdx.x == 0) {
    for (uint32_t r = 0; r < 2; r++) mbarrier_arrive_freed(l.freed, r);
    if (fault != FAULT("no_freed_wait")) mbarrier_wait_freed(l.freed, 0);
    if (fault == FAULT("ordinary_after_freed")) st_cluster(cluster_map(l.x, 1 - rank), 1.0f);
    mbarrier_arrive_expect_tx(l.loaded, 8192);
    tma_load_2d_multicast(l.x + rank * 4096, x, l.loaded, 0, row0 + int(rank) * 32, 3);
  }
  mbarrier_wait(l.loaded, 1);
}

__global__ void __launch_bounds__(128, 1) cluster(const __grid_constant__ CUtensorMap x,
                                                  const __grid_constant__ CUtensorMap w,
                                                  float* y,
                                                  int N,
                                                  int fault) {
  const Shared l = shared();
  const int row0 = int(blockIdx.y) * ROWS;
  begin(l, &x, &w, row0, fault);
  exchange(l, fault);
  if (fault == FAULT("cta_scope_wait"))
    mbarrier_wait(l.stored, 0);
  else if (fault != FAULT("no_wait_for_peer"))
    mbarrier_wait_cluster(l.stored, 0);
  mbarrier_wait(l.copied, 0);
  if (fault != FAULT("no_proxy_fence") && fault != FAULT("no_second_fence")) fence_proxy_async_shared();
  float d[WIDTH / 2];
  wgmma_fence(d);
  for (uint32_t k = 0; k < 4; k++)
    wgmma<bf16>(d, wgmma_advance(wgmma_descriptor_k128(l.h), 32 * k),
                wgmma_advance(wgmma_descriptor_k128(l.w), 32 * k), k > 0);
  wgmma_commit();
  wgmma_wait<0>();
  wgmma_hold(d);
  const int g = lane_id() / 4, q = lane_id() % 4, warp = int(threadIdx.x) / 32;
  for (int i = 0; i < WIDTH / 2; i++)
    y[int64_t(row0 + 16 * warp + g + 8 * (i / 2 % 2)) * N + int(cluster_rank()) * 64 + 8 * (i / 4) + 2 * q +
      i % 2] = d[i];
  d[0] += 0 * low_of<bf16>(*reinterpret_cast<const uint32_t*>(l.x + threadIdx.x * 64));
  __syncthreads();
  reload(l, &x, row0, fault);
  if (fault == FAULT("late_store"))
    st_cluster(cluster_map(l.stage, 1 - cluster_rank()) + threadIdx.x * 4, 1.0f);
  if (fault == FAULT("no_last_sync") || fault == FAULT("late_store")) return;
  cluster_sync();
  if (fault == FAULT("read_after_end") && cluster_rank() == 0 && threadIdx.x == 0)
    y[int64_t(row0) * N] += ld_cluster_f32(cluster_map(l.h, 1));
}

}  // namespace mole

int main(int argc, char** argv) {
  using namespace mole;
  const emu::Arguments args(argc, argv);
  const int fault = chosen_fault(args, kFaults);
  const int m = 128, n = 128;
  emu::Input<bf16> x("x", m * 64), w("w", n * 64);
  emu::Output<float> y("y", size_t(m) * n);
  fill(x, 1), fill(w, 2);
  const CUtensorMap xmap = emu::tensor_map_2d(x.data(), m, 64, 32, 64, 128),
                    wmap = emu::tensor_map_2d(w.data(), n, 64, 64, 64, 128);
  emu::Launch launch;
  launch.grid = dim3(2, m / ROWS), launch.block = dim3(128), launch.cluster = dim3(2),
  launch.smem = 4 * 8192 + 64, launch.seed = args.seed();
  launch.resident = 2;
  emu::launch(launch, [&] { cluster(xmap, wmap, y.data(), n, fault); });
  for (size_t i = 0; i < y.size(); i++) y[i] /= 2;
  return verdict(product_error(x.data(), w.data(), y.data(), m, n, 64));
}

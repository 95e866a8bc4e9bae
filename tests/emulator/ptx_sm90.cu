// Every PTX body of the sm_90a vocabulary, instantiated once, for the compiler and the disassembler to look at.
#include "../../csrc/cuda/device/device.h"

using namespace mole;

__global__ void __launch_bounds__(128, 1) copies(const __grid_constant__ CUtensorMap map, const float* src, float* dst) {
  unsigned char* smem = dynamic_smem();
  uint64_t* bar = reinterpret_cast<uint64_t*>(smem + 65536);
  if (threadIdx.x == 0) {
    mbarrier_init(bar, 2);
    mbarrier_init(bar + 1, 1);
    fence_mbarrier_init();
    tma_prefetch(&map);
  }
  cluster_arrive_relaxed();
  cluster_wait();
  griddep_wait();
  if (warp_id() == 0 && elect_one()) {
    mbarrier_expect_tx(bar, 16);
    mbarrier_arrive_expect_tx(bar, 32768);
    mbarrier_arrive_remote(bar, 1);
    mbarrier_arrive_freed(bar, 1);
    mbarrier_arrive_expect_tx_remote(bar, 1, 64);
    tma_load_2d(smem, &map, bar, 0, 1);
    tma_load_2d(smem, &map, bar, 0, 1, policy_evict_first());
    tma_load_2d(smem, &map, bar, 0, 1, policy_evict_last());
    tma_load_3d(smem, &map, bar, 0, 1, 2);
    tma_load_2d_multicast(smem, &map, bar, 0, 1, 3);
    tma_load_3d_multicast(smem, &map, bar, 0, 1, 2, 3);
    bulk_load(smem, src, 64, bar);
    bulk_copy_cluster(cluster_map(smem, 1), smem, 64, cluster_map(bar, 1));
  }
  mbarrier_arrive(bar);
  mbarrier_wait(bar, 0);
  mbarrier_wait_cluster(bar + 1, 0);
  const uint32_t peer = cluster_map(smem, (cluster_rank() + 1) % cluster_size()), there = cluster_map(bar, 1);
  st_cluster(peer, uint32_t(threadIdx.x));
  st_cluster(peer, 1.0f);
  st_cluster(peer, make_uint4(1, 2, 3, 4));
  st_async(peer, 1u, there);
  st_async(peer, make_uint2(1, 2), there);
  st_async(peer, make_uint4(1, 2, 3, 4), there);
  dst[threadIdx.x] = ld_cluster_f32(peer) + float(ld_cluster_u32(peer)) + float(ld_cluster_16(peer).x);
  uint32_t r[4] = {threadIdx.x, 1, 2, 3};
  stmatrix_x4(smem + threadIdx.x * 16, r);
  stmatrix_x4_trans(smem + threadIdx.x * 16, r);
  fence_proxy_async_shared();
  fence_proxy_async_global();
  fence_proxy_async();
  named_barrier_sync(1, 128);
  named_barrier_arrive(2, 128);
  if (threadIdx.x == 0) {
    tma_store_2d(&map, smem, 0, 1);
    tma_store_3d(&map, smem, 0, 1, 2);
    bulk_store(dst, smem, 64);
    bulk_commit();
    bulk_wait_read<0>();
    bulk_wait<0>();
    mbarrier_invalidate(bar);
  }
  griddep_launch_dependents();
  cluster_sync();
}

template <class T, int N, Major A, Major B>
__global__ void __launch_bounds__(128, 1) product(float* out) {
  unsigned char* smem = dynamic_smem();
  float d[N / 2];
  for (int i = 0; i < N / 2; i++) d[i] = 0;
  registers_increase<232>();
  const uint64_t a = wgmma_descriptor_k128(smem), b = wgmma_descriptor<Swizzle::B128>(smem + 32768, 8192, 1024);
  uint32_t ra[4] = {threadIdx.x, 1, 2, 3};
  wgmma_fence(d);
  wgmma<T, A, B>(d, a, b);
  wgmma<T, B>(d, ra, wgmma_advance(b, 32));
  wgmma_commit();
  wgmma_wait<0>();
  wgmma_hold(d);
  for (int i = 0; i < N / 2; i++) out[i * 128 + threadIdx.x] = d[i];
  registers_decrease<24>();
}
#define EACH(N)                                                          \
  template __global__ void product<bf16, N, Major::K, Major::K>(float*); \
  template __global__ void product<fp16, N, Major::MN, Major::MN>(float*);
EACH(8)
EACH(16) EACH(24) EACH(32) EACH(40) EACH(48) EACH(56) EACH(64) EACH(72) EACH(80) EACH(88) EACH(96) EACH(104) EACH(112) EACH(120) EACH(128)
    EACH(136) EACH(144) EACH(152) EACH(160) EACH(168) EACH(176) EACH(184) EACH(192) EACH(200) EACH(208) EACH(216) EACH(224) EACH(232)
        EACH(240) EACH(248) EACH(256)

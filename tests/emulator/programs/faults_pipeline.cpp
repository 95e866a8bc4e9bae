// A pipeline with TMA, wgmma and a TMA store, in which fault=NAME plants one mistake. fault=none is right.
// y[64·tiles, 64] = x[64·tiles, K] w[64, K]ᵀ, bf16 out; warp 4 produces, a warpgroup consumes; each CTA
// computes two row tiles.
#include "csrc/cuda/device/device.h"
#include "faults.h"
#include "gemm.h"

namespace mole {

constexpr const char* kFaults[] = {"none",
                                   "no_full_wait",
                                   "no_empty_wait",
                                   "few_bytes",
                                   "many_bytes",
                                   "early_release",
                                   "no_release",
                                   "no_init_fence",
                                   "no_init_barrier",
                                   "read_before_wait",
                                   "no_wgmma_fence",
                                   "no_proxy_fence",
                                   "no_store_barrier",
                                   "no_store_wait",
                                   "buffer_reuse",
                                   "double_arrival",
                                   "misaligned_tile",
                                   "descriptor_out_of_bounds",
                                   "divergent_descriptor",
                                   "wrong_parity",
                                   "uninitialised_barrier",
                                   "row_out_of_bounds",
                                   "lane_skips_wgmma",
                                   "wait_leaves_one",
                                   "overwritten_in_flight",
                                   "wgmma_not_waited",
                                   "load_not_waited",
                                   "barrier_overwritten",
                                   "init_twice",
                                   "expect_after_phase",
                                   "map_rank",
                                   "accumulator_write",
                                   "fragment_late",
                                   "swizzle_differs"};

constexpr int KT = 64, STAGES = 2, STEPS = 4, TILES = 2;

struct Layout {
  unsigned char *a, *b, *c;
  uint64_t *full, *empty;
};

__device__ Layout layout() {
  unsigned char* s = dynamic_smem();
  auto* bars = reinterpret_cast<uint64_t*>(s + 5 * 8192);
  return {s, s + 2 * 8192, s + 4 * 8192, bars, bars + STAGES};
}

__device__ void produce(const CUtensorMap* x, const CUtensorMap* w, const Layout& l, int row0, int fault) {
  for (int i = 0; i < STEPS * TILES; i++) {
    const int s = i % STAGES;
    uint32_t parity = uint32_t(i / STAGES + 1) & 1u;
    if (fault == FAULT("wrong_parity")) parity ^= 1u;
    if (fault != FAULT("no_empty_wait")) mbarrier_wait(l.empty + s, parity);
    const uint32_t bytes = fault == FAULT("few_bytes") ? 8192 : fault == FAULT("many_bytes") ? 16400 : 16384;
    mbarrier_arrive_expect_tx(l.full + s, bytes);
    if (fault == FAULT("double_arrival") && i == 3) mbarrier_arrive(l.full + s);
    if (fault == FAULT("expect_after_phase") && i == 0) mbarrier_expect_tx(l.full + s, 16);
    const int tile = i / STEPS, k = i % STEPS * KT;
    if (fault == FAULT("map_rank") && i == 0) tma_load_3d(l.a, x, l.full, k, row0, 0);
    tma_load_2d(l.a + s * 8192 + (fault == FAULT("misaligned_tile") ? 128 : 0), x, l.full + s, k,
                row0 + tile * 64);
    tma_load_2d(l.b + s * 8192, w, l.full + s, k, 0);
  }
  if (fault == FAULT("load_not_waited")) {
    mbarrier_wait(l.empty, 1);
    mbarrier_arrive_expect_tx(l.full, 8192);
    tma_load_2d(l.a, x, l.full, 0, row0);
  }
}

__device__ void multiply(float (&d)[32], const Layout& l, int tile, int fault) {
  for (int i = 0; i < 32; i++) d[i] = 0;
  for (int k = 0; k < STEPS; k++) {
    const int i = tile * STEPS + k, s = i % STAGES;
    if (fault != FAULT("no_full_wait")) mbarrier_wait(l.full + s, uint32_t(i / STAGES) & 1u);
    if (fault != FAULT("no_wgmma_fence") || k) wgmma_fence(d);
    if (fault == FAULT("accumulator_write")) d[3] = 0;
    for (int e = 0; e < 4; e++) {
      uint64_t a = wgmma_descriptor_k128(l.a + s * 8192), b = wgmma_descriptor_k128(l.b + s * 8192);
      if (fault == FAULT("descriptor_out_of_bounds")) b = wgmma_advance(b, 3 * 8192);
      if (fault == FAULT("divergent_descriptor") && threadIdx.x == 77) a = wgmma_advance(a, 32);
      if (fault == FAULT("swizzle_differs")) a = wgmma_descriptor<Swizzle::B64>(l.a + s * 8192, 16, 1024);
      if (fault == FAULT("lane_skips_wgmma") && threadIdx.x == 77 && i == 3) continue;
      if (fault == FAULT("fragment_late")) {
        uint32_t ra[4] = {0, 0, 0, threadIdx.x};
        wgmma<bf16>(d, ra, b);
      } else {
        wgmma<bf16>(d, wgmma_advance(a, uint32_t(e) * 32), wgmma_advance(b, uint32_t(e) * 32));
      }
    }
    wgmma_commit();
    if (fault == FAULT("early_release")) mbarrier_arrive(l.empty + s);
    if (fault == FAULT("read_before_wait") && k == 1) d[0] += 1;
    if (fault == FAULT("overwritten_in_flight") && threadIdx.x == 5)
      reinterpret_cast<uint32_t*>(l.a + s * 8192)[7] = 0;
    if (fault == FAULT("wait_leaves_one"))
      wgmma_wait<1>();
    else if (fault != FAULT("wgmma_not_waited") || tile == 0 || k < STEPS - 1)
      wgmma_wait<0>();
    if (fault == FAULT("wgmma_not_waited") && tile && k == STEPS - 1) return;
    wgmma_hold(d);
    if (fault == FAULT("no_release") || fault == FAULT("early_release")) continue;
    mbarrier_arrive(l.empty + s);
  }
}

__device__ void store(
    const float (&d)[32], const CUtensorMap* y, bf16* plain, const Layout& l, int row, int rows, int fault) {
  const int w = int(threadIdx.x) / 32, g = lane_id() / 4, q = lane_id() % 4;
  if (threadIdx.x == 0 && fault != FAULT("buffer_reuse")) bulk_wait_read<0>();
  named_barrier_sync(1, 128);
  for (int i = 0; i < 16; i++) {
    const int r = 16 * w + g + 8 * (i % 2), c = 8 * (i / 2) + 2 * q;
    const uint32_t at = swizzled<Swizzle::B128>(uint32_t(r * 128 + c * 2));
    *reinterpret_cast<uint32_t*>(l.c + at) = pack2<bf16>(d[2 * i], d[2 * i + 1]);
  }
  if (fault == FAULT("row_out_of_bounds") && threadIdx.x == 64) plain[int64_t(rows) * 64] = bf16{0};
  if (fault != FAULT("no_proxy_fence")) fence_proxy_async_shared();
  if (fault != FAULT("no_store_barrier")) named_barrier_sync(1, 128);
  if (threadIdx.x == 0) {
    tma_store_2d(y, l.c, 0, row);
    bulk_commit();
  }
}

__global__ void __launch_bounds__(160, 1) pipeline(const __grid_constant__ CUtensorMap x,
                                                   const __grid_constant__ CUtensorMap w,
                                                   const __grid_constant__ CUtensorMap y,
                                                   bf16* plain,
                                                   int rows,
                                                   int fault) {
  const Layout l = layout();
  const int row0 = int(blockIdx.x) * 64 * TILES;
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) {
      mbarrier_init(l.full + s, 1);
      if (fault != FAULT("uninitialised_barrier")) mbarrier_init(l.empty + s, 128);
    }
    if (fault == FAULT("init_twice")) mbarrier_init(l.full, 1);
    if (fault == FAULT("barrier_overwritten")) l.full[0] = 0;
    if (fault != FAULT("no_init_fence")) fence_mbarrier_init();
  }
  if (fault != FAULT("no_init_barrier")) __syncthreads();
  if (threadIdx.x / 32 == 4) {
    if (threadIdx.x == 128) produce(&x, &w, l, row0, fault);
    return;
  }
  for (int tile = 0; tile < TILES; tile++) {
    float d[32];
    multiply(d, l, tile, fault);
    if (fault == FAULT("wgmma_not_waited") && tile) return;
    store(d, &y, plain, l, row0 + tile * 64, rows, fault);
  }
  if (threadIdx.x == 0 && fault != FAULT("no_store_wait")) bulk_wait_read<0>();
}

}  // namespace mole

int main(int argc, char** argv) {
  using namespace mole;
  const emu::Arguments args(argc, argv);
  const int fault = chosen_fault(args, kFaults);
  const int rows = 64 * TILES * 2 - 5, k = KT * STEPS - 8;
  emu::Input<bf16> x("x", size_t(rows) * k), w("w", size_t(64) * k);
  emu::Output<bf16> y("y", size_t(rows) * 64);
  fill(x, 1), fill(w, 2);
  const CUtensorMap xmap = emu::tensor_map_2d(x.data(), rows, k, 64, KT, 128),
                    wmap = emu::tensor_map_2d(w.data(), 64, k, 64, KT, 128);
  const CUtensorMap ymap = emu::tensor_map_2d(y.data(), rows, 64, 64, 64, 128);
  emu::Launch launch;
  launch.grid = dim3(2), launch.block = dim3(160), launch.smem = 5 * 8192 + 64, launch.seed = args.seed();
  emu::launch(launch, [&] { pipeline(xmap, wmap, ymap, y.data(), rows, fault); });
  std::vector<float> got(size_t(rows) * 64);
  for (size_t i = 0; i < got.size(); i++) got[i] = to_float(y[i]);
  return verdict(product_error(x.data(), w.data(), got.data(), rows, 64, k), 3e-3);
}

// y[M,N] = x[M,K] w[N,K]ᵀ: one producer warp with TMA, one warpgroup with wgmma, a ring of mbarriers.
#include "csrc/cuda/device/device.h"
#include "gemm.h"

namespace mole {

constexpr int TM = 64, TN = 64, TK = 64, STAGES = 3;

__global__ void __launch_bounds__(160, 1) gemm_wgmma(const __grid_constant__ CUtensorMap xmap,
                                                     const __grid_constant__ CUtensorMap wmap,
                                                     float* y,
                                                     int M,
                                                     int N,
                                                     int K) {
  unsigned char* smem = dynamic_smem();
  const auto a = [&](int s) { return smem + s * 8192; };
  const auto b = [&](int s) { return smem + (STAGES + s) * 8192; };
  auto* full = reinterpret_cast<uint64_t*>(smem + 2 * STAGES * 8192);
  uint64_t* empty = full + STAGES;
  const int m0 = int(blockIdx.y) * TM, n0 = int(blockIdx.x) * TN, steps = (K + TK - 1) / TK;
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) mbarrier_init(full + s, 1), mbarrier_init(empty + s, 128);
    fence_mbarrier_init();
  }
  __syncthreads();
  if (warp_id() == 4) {
    if (elect_one())
      for (int i = 0; i < steps; i++) {
        const int s = i % STAGES;
        mbarrier_wait(empty + s, uint32_t(i / STAGES + 1) & 1u);
        mbarrier_arrive_expect_tx(full + s, 16384);
        tma_load_2d(a(s), &xmap, full + s, i * TK, m0);
        tma_load_2d(b(s), &wmap, full + s, i * TK, n0);
      }
    return;
  }
  float d[TN / 2];
  for (int i = 0; i < TN / 2; i++) d[i] = 0;
  for (int i = 0; i < steps; i++) {
    const int s = i % STAGES;
    mbarrier_wait(full + s, uint32_t(i / STAGES) & 1u);
    wgmma_fence(d);
    for (int k = 0; k < TK / 16; k++)
      wgmma<bf16>(d, wgmma_advance(wgmma_descriptor_k128(a(s)), uint32_t(k) * 32),
                  wgmma_advance(wgmma_descriptor_k128(b(s)), uint32_t(k) * 32));
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_hold(d);
    mbarrier_arrive(empty + s);
  }
  const int w = int(threadIdx.x) / 32, g = lane_id() / 4, q = lane_id() % 4;
  for (int i = 0; i < TN / 2; i++) {
    const int row = m0 + 16 * w + g + 8 * (i / 2 % 2), column = n0 + 8 * (i / 4) + 2 * q + i % 2;
    if (row < M && column < N) y[int64_t(row) * N + column] = d[i];
  }
}

}  // namespace mole

int main(int argc, char** argv) {
  using namespace mole;
  emu::Arguments args(argc, argv);
  const int m = args.get("m", 100), n = args.get("n", 72), k = args.get("k", 136);
  emu::Input<bf16> x("x", size_t(m) * k), w("w", size_t(n) * k);
  emu::Output<float> y("y", size_t(m) * n);
  fill(x, 1), fill(w, 2);
  const CUtensorMap xmap = emu::tensor_map_2d(x.data(), m, k, TM, TK, 128),
                    wmap = emu::tensor_map_2d(w.data(), n, k, TN, TK, 128);
  emu::Launch launch;
  launch.grid = dim3((n + TN - 1) / TN, (m + TM - 1) / TM), launch.block = dim3(160);
  launch.smem = 2 * STAGES * 8192 + 2 * STAGES * 8, launch.seed = args.seed();
  emu::launch(launch, [&] { gemm_wgmma(xmap, wmap, y.data(), m, n, k); });
  return verdict(product_error(x.data(), w.data(), y.data(), m, n, k));
}

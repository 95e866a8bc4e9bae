// y[M,N] = x[M,K] w[N,K]ᵀ with mma.sync, ldmatrix and a double buffer of cp.async: the portable vocabulary.
#include "csrc/cuda/device/portable.h"
#include "gemm.h"

namespace mole {

constexpr int BM = 64, BN = 64, BK = 32, LD = BK + 8;

template <class T>
__device__ void load_tile(T* tile, const T* from, int row0, int rows, int k0, int K) {
  for (int i = int(threadIdx.x); i < BM * BK / 8; i += 128) {
    const int r = i / (BK / 8), c = i % (BK / 8) * 8;
    const bool in = row0 + r < rows && k0 + c < K;
    cp_async_16(tile + r * LD + c, in ? from + int64_t(row0 + r) * K + k0 + c : from, in ? 16 : 0);
  }
}

template <class T>
__global__ void __launch_bounds__(128)
    gemm_portable(const T* __restrict__ x, const T* __restrict__ w, float* y, int M, int N, int K) {
  T* a = reinterpret_cast<T*>(dynamic_smem());
  T* b = a + 2 * BM * LD;
  const int m0 = int(blockIdx.y) * BM, n0 = int(blockIdx.x) * BN, steps = (K + BK - 1) / BK;
  const int warp = int(threadIdx.x) / 32, lane = lane_id();
  float d[8][4] = {};
  const auto load = [&](int i) {
    if (i < steps) {
      load_tile(a + i % 2 * BM * LD, x, m0, M, i * BK, K);
      load_tile(b + i % 2 * BN * LD, w, n0, N, i * BK, K);
    }
    cp_async_commit();
  };
  load(0);
  for (int i = 0; i < steps; i++) {
    load(i + 1);
    cp_async_wait<1>();
    __syncthreads();
    const T *at = a + i % 2 * BM * LD, *bt = b + i % 2 * BN * LD;
    for (int k = 0; k < BK; k += 16) {
      uint32_t fa[4], fb[4];
      ldmatrix_x4(fa, at + (warp * 16 + lane % 16) * LD + k + lane / 16 * 8);
      for (int j = 0; j < 4; j++) {
        ldmatrix_x4(fb, bt + (j * 16 + lane % 8 + lane / 16 * 8) * LD + k + lane / 8 % 2 * 8);
        mma_m16n8k16<T>(d[2 * j], fa, {fb[0], fb[1]});
        mma_m16n8k16<T>(d[2 * j + 1], fa, {fb[2], fb[3]});
      }
    }
    __syncthreads();
  }
  cp_async_wait<0>();
  for (int j = 0; j < 8; j++)
    for (int i = 0; i < 4; i++) {
      const int row = m0 + warp * 16 + lane / 4 + i / 2 * 8, column = n0 + j * 8 + lane % 4 * 2 + i % 2;
      if (row < M && column < N) y[int64_t(row) * N + column] = d[j][i];
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
  emu::Launch launch;
  launch.grid = dim3((n + BN - 1) / BN, (m + BM - 1) / BM), launch.block = dim3(128);
  launch.smem = 2 * (BM + BN) * LD * sizeof(bf16), launch.seed = args.seed(), launch.resident = 2;
  emu::launch(launch, [&] { gemm_portable<bf16>(x.data(), w.data(), y.data(), m, n, k); });
  return verdict(product_error(x.data(), w.data(), y.data(), m, n, k));
}

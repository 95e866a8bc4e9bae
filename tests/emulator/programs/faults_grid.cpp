// A persistent grid with flags in global memory, in which fault=NAME plants one mistake. fault=none is right.
// h tiles [32, 64] = 2 x first, as extra work of the grid; then each row block's flag says that h is there,
// and its readers take it by TMA (even blocks) and by ordinary loads (odd ones): y = h + 1, and each sample's
// sum in a counter.
#include "csrc/cuda/device/device.h"
#include "faults.h"
#include "gemm.h"

namespace mole {

constexpr const char* kFaults[] = {"none",
                                   "relaxed_flag",
                                   "relaxed_load",
                                   "no_release_barrier",
                                   "no_proxy_fence",
                                   "not_resident",
                                   "same_output",
                                   "plain_flag",
                                   "plain_flag_load",
                                   "no_acquire_barrier",
                                   "wrong_block",
                                   "flag_before_data",
                                   "flag_out_of_bounds",
                                   "wrong_count",
                                   "tile_past_end",
                                   "counter_uninitialised",
                                   "fence_after",
                                   "bulk_store_not_waited"};

constexpr int ROWS = 32, WIDE = 64, THREADS = 64;

__device__ void make_h(const bf16* x, bf16* h, uint32_t* flags, int block, int fault) {
  const int t = int(threadIdx.x);
  if (fault == FAULT("flag_before_data") && t == 0) reduce_add_release(flags + block, 1);
  if (block % 2) {
    // through shared memory and a bulk store
    auto* stage = reinterpret_cast<bf16*>(dynamic_smem() + 8192);
    if (t == 0) bulk_wait_read<0>();
    __syncthreads();
    for (int i = t; i < ROWS * WIDE; i += THREADS)
      stage[i] = from_float<bf16>(2 * to_float(x[block * ROWS * WIDE + i]));
    fence_proxy_async_shared();
    __syncthreads();
    if (t == 0) {
      bulk_store(h + block * ROWS * WIDE, stage, ROWS * WIDE * 2);
      bulk_commit();
      if (fault == FAULT("bulk_store_not_waited"))
        bulk_wait_read<0>();
      else
        bulk_wait<0>();
    }
  } else {
    for (int i = t; i < ROWS * WIDE; i += THREADS)
      h[block * ROWS * WIDE + i] = from_float<bf16>(2 * to_float(x[block * ROWS * WIDE + i]));
    if (fault != FAULT("no_proxy_fence")) fence_proxy_async_global();
  }
  if (fault != FAULT("no_release_barrier")) __syncthreads();
  if (t) return;
  if (fault == FAULT("relaxed_flag"))
    reduce_add_relaxed(flags + block, 1);
  else if (fault == FAULT("plain_flag"))
    flags[block] = 1;
  else if (fault == FAULT("flag_out_of_bounds"))
    reduce_add_release(flags - 1, 1);
  else if (fault == FAULT("fence_after"))
    reduce_add_relaxed(flags + block, 1), __threadfence();
  else if (block % 4 == 2)
    __threadfence(), reduce_add_relaxed(flags + block, 1);
  else if (fault != FAULT("flag_before_data"))
    reduce_add_release(flags + block, 1);
}

__device__ void await(uint32_t* flags, int block, int fault) {
  if (threadIdx.x == 0) {
    const uint32_t want = fault == FAULT("wrong_count") ? 2 : 1;
    if (fault == FAULT("relaxed_load"))
      while (load_relaxed(flags + block) < want) __nanosleep(20);
    else if (fault == FAULT("plain_flag_load"))
      while (flags[block] < want) __nanosleep(20);
    else if (block % 4 == 1) {
      while (load_relaxed(flags + block) < want) __nanosleep(20);
      __threadfence();
    } else
      while (load_acquire(flags + block) < want) __nanosleep(20);
  }
  if (fault != FAULT("no_acquire_barrier")) __syncthreads();
}

__global__ void __launch_bounds__(THREADS, 1) persistent(const __grid_constant__ CUtensorMap hmap,
                                                         const bf16* x,
                                                         bf16* h,
                                                         float* y,
                                                         uint32_t* flags,
                                                         float* total,
                                                         int blocks,
                                                         int fault) {
  unsigned char* smem = dynamic_smem();
  auto* bar = reinterpret_cast<uint64_t*>(smem + 16384);
  const int t = int(threadIdx.x), ctas = int(gridDim.x);
  if (t == 0) mbarrier_init(bar, 1), fence_mbarrier_init();
  __syncthreads();
  for (int b = int(blockIdx.x); b < blocks; b += ctas) make_h(x, h, flags, b, fault);
  uint32_t phase = 0;
  float sum = 0;
  // every CTA reads blocks that others made
  for (int b = int(blockIdx.x); b < blocks; b += ctas) {
    const int from = (b + 1) % blocks;
    await(flags, fault == FAULT("wrong_block") ? b : from, fault);
    if (from % 2 == 0) {
      if (t == 0) {
        mbarrier_arrive_expect_tx(bar, ROWS * WIDE * 2);
        tma_load_2d(smem, &hmap, bar, 0, from * ROWS);
      }
      mbarrier_wait(bar, phase);
      phase ^= 1u;
    } else {
      for (int i = t; i < ROWS * WIDE; i += THREADS)
        reinterpret_cast<bf16*>(smem)[i] =
            h[from * ROWS * WIDE + i + (fault == FAULT("tile_past_end") && from == blocks - 1 ? 64 : 0)];
      fence_proxy_async_shared();
      __syncthreads();
    }
    for (int i = t; i < ROWS * WIDE; i += THREADS) {
      const float v = to_float(reinterpret_cast<const bf16*>(smem)[i]) + 1;
      y[(fault == FAULT("same_output") ? from / 2 : from) * ROWS * WIDE + i] = v;
      sum += v;
    }
    __syncthreads();
  }
  reduce_add_relaxed(fault == FAULT("counter_uninitialised") ? y + 5 : total, sum);
  if (t == 0) bulk_wait_read<0>();
}

}  // namespace mole

int main(int argc, char** argv) {
  using namespace mole;
  const emu::Arguments args(argc, argv);
  const int fault = chosen_fault(args, kFaults);
  const int blocks = 8;
  const size_t all = size_t(blocks) * ROWS * WIDE;
  emu::Input<bf16> x("x", all);
  emu::Output<bf16> h("h", all);
  emu::Output<float> y("y", all);
  emu::Memory<uint32_t> flags("flags", blocks);
  emu::Memory<float> total("total", 1);
  emu::Random random(3);
  for (size_t i = 0; i < all; i++) x[i] = from_float<bf16>(float(int(random.next() % 9) - 4));
  const CUtensorMap map = emu::tensor_map_2d(h.data(), blocks * ROWS, WIDE, ROWS, WIDE, 0);
  emu::Launch launch;
  launch.grid = dim3(4), launch.block = dim3(THREADS), launch.smem = 16384 + 16, launch.seed = args.seed();
  launch.resident = fault == FAULT("not_resident") ? 1 : 0, launch.steps = 1000000;
  emu::launch(launch, [&] {
    persistent(map, x.data(), h.data(), y.data(), flags.data(), total.data(), blocks, fault);
  });
  double sum = 0;
  for (size_t i = 0; i < all; i++) {
    const float right = 2 * to_float(x[i]) + 1;
    if (y[i] != right) return std::printf("y[%zu] is %g, expected %g\n", i, double(y[i]), double(right)), 1;
    sum += right;
  }
  return total[0] == float(sum) ? 0 : 1;
}

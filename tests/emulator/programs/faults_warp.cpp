// Warps, CTA barriers, cp.async and plain shared memory, in which fault=NAME plants one mistake. fault=none
// is right. Column sums of x [64, 64]: rows come by cp.async into a ring of two, warps sum with ldmatrix and
// mma by ones, partial sums meet in shared memory, one warp adds them with shuffles and writes.
#include "csrc/cuda/device/device.h"
#include "faults.h"
#include "gemm.h"

namespace mole {

constexpr const char* kFaults[] = {"none",
                                   "no_reuse_barrier",
                                   "no_copy_wait",
                                   "misaligned_ldmatrix",
                                   "half_barrier",
                                   "half_shuffle",
                                   "no_syncwarp",
                                   "uninitialised",
                                   "named_count",
                                   "named_mismatch",
                                   "copy_at_exit",
                                   "smem_out_of_bounds",
                                   "misaligned_vector",
                                   "writes_input",
                                   "mask_without_me",
                                   "reads_past_input",
                                   "copy_misaligned",
                                   "lane_exits_early",
                                   "lanes_race",
                                   "double_writer",
                                   "static_variable",
                                   "different_calls",
                                   "arrive_only",
                                   "no_barrier_before_sum",
                                   "register_budget",
                                   "registers_diverge",
                                   "fragment_index",
                                   "atomic_and_plain",
                                   "copy_past_input",
                                   "no_async_arrival_wait"};

constexpr int WIDE = 64, LD = WIDE + 8, STEP = 16, STEPS = 4, THREADS = 128;
int static_counter = 0;

__device__ void copy_step(bf16* ring, const bf16* x, int step, int fault) {
  for (int i = int(threadIdx.x); i < STEP * WIDE / 8; i += THREADS) {
    const int r = i / (WIDE / 8), c = i % (WIDE / 8) * 8;
    const bf16* from = x + (step * STEP + r) * WIDE + c + (fault == FAULT("copy_misaligned") ? 4 : 0);
    if (fault == FAULT("copy_past_input") && step == STEPS - 1) from += 16 * WIDE;
    cp_async_16(ring + (step % 2 * STEP + r) * LD + c, from, 16);
  }
  cp_async_commit();
}

// partial[warp][16 columns]: the warp's columns summed over STEP rows, added to d
__device__ void sum_step(float (&d)[2][4], const bf16* tile, int warp, int fault) {
  const int lane = lane_id();
  const uint32_t one = pack2<bf16>(1.0f, 1.0f);
  uint32_t b[4];
  const bf16* row =
      tile + (lane % 16) * LD + warp * 16 + lane / 16 * 8 + (fault == FAULT("misaligned_ldmatrix") ? 4 : 0);
  ldmatrix_x4_trans(b, row);
  if (fault == FAULT("different_calls") && lane == 7)
    __syncwarp();
  else
    mma_m16n8k16<bf16>(d[0], {one, one, one, one}, {b[0], b[1]});
  if (fault == FAULT("fragment_index")) d[0][warp + 1] = 0;
  mma_m16n8k16<bf16>(d[1], {one, one, one, one}, {b[2], b[3]});
}

__device__ void finish(float* sums, float* scratch, float* y, const bf16* x, int fault) {
  const int t = int(threadIdx.x), lane = t % 32;
  if (t >= 32) return;
  for (int half = 0; half < 2; half++) {
    float v = sums[lane + 32 * half];
    if (fault == FAULT("smem_out_of_bounds") && lane == 31) v += sums[4096];
    if (fault == FAULT("uninitialised") && lane == 3) v += scratch[512];
    // through a neighbour and back: shuffles, and a warp's own exchange in shared memory
    v = __shfl_xor_sync(fault == FAULT("mask_without_me") ? 0x0000ffffu : 0xffffffffu, v, 1);
    if (fault != FAULT("half_shuffle") || lane < 16) v = __shfl_xor_sync(0xffffffffu, v, 1);
    scratch[lane] = v;
    if (fault != FAULT("no_syncwarp")) __syncwarp();
    const float mine = scratch[31 - lane];
    __syncwarp();
    scratch[31 - lane] = mine;
    __syncwarp();
    y[lane + 32 * half] = scratch[lane];
    if (fault == FAULT("atomic_and_plain") && half && lane == 6) y[37] = 0;
    if (fault == FAULT("double_writer")) y[(lane + 32 * half) & 62] = scratch[lane];
    if (fault == FAULT("atomic_and_plain") && half && lane == 5) reduce_add_relaxed(y + 37, 0.0f);
    __syncwarp();
  }
  if (fault == FAULT("writes_input") && t == 0) const_cast<bf16*>(x)[0] = bf16{0};
  if (fault == FAULT("reads_past_input") && t == 0) y[0] += to_float(x[WIDE * STEP * STEPS]);
  if (fault == FAULT("misaligned_vector") && t == 0) y[0] += reinterpret_cast<const float4*>(sums + 1)->x;
  if (fault == FAULT("static_variable") && t == 0) static_counter++;
}

__global__ void __launch_bounds__(THREADS) column_sums(const bf16* x, float* y, int fault) {
  auto* ring = reinterpret_cast<bf16*>(dynamic_smem());
  auto* sums = reinterpret_cast<float*>(dynamic_smem() + 2 * STEP * LD * 2);
  auto* bar = reinterpret_cast<uint64_t*>(sums + 64);
  float* scratch = sums + 128;
  const int t = int(threadIdx.x), warp = t / 32, lane = t % 32;
  if (fault == FAULT("register_budget")) registers_increase<232>();
  if (fault == FAULT("registers_diverge")) {
    if (t == 5)
      registers_decrease<40>();
    else
      registers_decrease<24>();
  }
  if (t == 0) mbarrier_init(bar, THREADS);
  __syncthreads();
  float d[2][4] = {};
  copy_step(ring, x, 0, fault);
  for (int step = 0; step < STEPS; step++) {
    if (step + 1 < STEPS) copy_step(ring, x, step + 1, fault);
    if (step + 1 < STEPS) {
      if (fault != FAULT("no_copy_wait")) cp_async_wait<1>();
      __syncthreads();
    } else if (fault == FAULT("copy_at_exit")) {
      return;
    } else {
      // the last step by the other way: the copies themselves arrive
      mbarrier_arrive_after_cp_async(bar);
      if (fault != FAULT("no_async_arrival_wait")) mbarrier_wait(bar, 0);
    }
    sum_step(d, ring + step % 2 * STEP * LD, warp, fault);
    if (fault != FAULT("no_reuse_barrier")) __syncthreads();
  }
  if (fault == FAULT("lane_exits_early") && t == 40) return;
  if (lane < 4)
    for (int j = 0; j < 2; j++)
      for (int i = 0; i < 2; i++) sums[warp * 16 + j * 8 + lane * 2 + i] = d[j][i];
  if (fault == FAULT("lanes_race") && warp == 1) sums[20] = d[0][0];
  if (fault == FAULT("half_barrier")) {
    if (t < 64) __syncthreads();
  } else if (fault == FAULT("named_count")) {
    named_barrier_sync(1, 100);
  } else if (fault == FAULT("named_mismatch")) {
    named_barrier_sync(1, t < 64 ? 128 : 96);
  } else if (fault == FAULT("arrive_only")) {
    named_barrier_arrive(1, 128);
  } else if (fault != FAULT("no_barrier_before_sum")) {
    named_barrier_sync(1, 128);
  }
  finish(sums, scratch, y, x, fault);
}

}  // namespace mole

int main(int argc, char** argv) {
  using namespace mole;
  const emu::Arguments args(argc, argv);
  const int fault = chosen_fault(args, kFaults);
  const int rows = STEP * STEPS;
  emu::Input<bf16> x("x", size_t(rows) * WIDE);
  emu::Output<float> y("y", WIDE);
  emu::Random random(3);
  for (size_t i = 0; i < x.size(); i++) x[i] = from_float<bf16>(float(int(random.next() % 17) - 8));
  emu::Launch launch;
  launch.block = dim3(THREADS), launch.smem = 2 * STEP * LD * 2 + 8192, launch.seed = args.seed(),
  launch.registers = 168;
  emu::launch(launch, [&] { column_sums(x.data(), y.data(), fault); });
  for (int c = 0; c < WIDE; c++) {
    float s = 0;
    for (int r = 0; r < rows; r++) s += to_float(x[size_t(r) * WIDE + c]);
    if (y[c] != s) return std::printf("column %d: %g, expected %g\n", c, double(y[c]), double(s)), 1;
  }
  return 0;
}

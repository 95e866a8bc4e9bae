// Every PTX body of the portable vocabulary, for the compiler and the disassembler to look at.
#include "../../csrc/cuda/device/portable.h"

using namespace mole;

template <class T>
__global__ void __launch_bounds__(128) portable(const float* src, float* out, uint32_t* flags) {
  unsigned char* smem = dynamic_smem();
  cp_async_16(smem + threadIdx.x * 16, src + threadIdx.x * 4, int(threadIdx.x % 17));
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  uint32_t a[4], b[4], c[2], e[2];
  ldmatrix_x4(a, smem + threadIdx.x * 16);
  ldmatrix_x4_trans(b, smem + threadIdx.x * 16);
  ldmatrix_x2(c, smem + threadIdx.x * 16);
  ldmatrix_x2_trans(e, smem + threadIdx.x * 16);
  float d[4] = {0, 0, 0, 0};
  mma_m16n8k16<T>(d, a, c);
  mma_m16n8k16<T>(d, b, e);
  const uint32_t packed = pack2<T>(d[0], d[1]);
  out[threadIdx.x] = sigmoid(low_of<T>(packed)) + high_of<T>(packed) + to_float(from_float<T>(d[2])) + d[3];
  out[threadIdx.x] += float(load16_readonly(src).x);
  reduce_add_relaxed(out, 1.0f);
  fence_acq_rel_gpu();
  store_release(flags, load_acquire(flags + 1));
  store_relaxed(flags, load_relaxed(flags + 1));
  out[0] += float(atomic_add_relaxed(flags, 1) + atomic_add_release(flags, 1) + atomic_add_acq_rel(flags, 1));
  out[1] += float(atomic_cas_acq_rel(flags, 1, 2));
  reduce_add_release(flags, 1);
  reduce_add_relaxed(flags, 1);
  named_barrier_sync(1, 128);
  named_barrier_arrive(2, 128);
}
template __global__ void portable<bf16>(const float*, float*, uint32_t*);
template __global__ void portable<fp16>(const float*, float*, uint32_t*);

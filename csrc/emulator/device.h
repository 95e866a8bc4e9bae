// What a kernel sees in the emulator: CUDA's own names, and the software bodies of the vocabulary
// (csrc/cuda/device).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <type_traits>

// one process runs many CTAs: an aliasing promise that holds for one thread of a GPU need not hold here
#define __restrict__
#define __global__ inline
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

// a descriptor of a tensor in global memory: what the driver would encode into its 128 bytes
struct alignas(64) CUtensorMap {
  unsigned char* base;
  uint64_t size[5], stride[5];  // elements; bytes (of dimension 0: the element's)
  uint32_t box[5];
  uint32_t rank, element_bytes, swizzle_bytes, magic;
};

namespace emu {

enum Order { kRelaxed, kAcquire, kRelease, kAcqRel };
enum Scope { kCtaScope, kClusterScope, kFreed };
enum Space { kShared = 1, kGlobal = 2 };
enum Element { kBf16, kFp16 };

float bf16_to_float(uint16_t v);
uint16_t float_to_bf16(float f);
float fp16_to_float(uint16_t v);
uint16_t float_to_fp16(float f);
inline float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

unsigned char* dynamic_smem();
uint32_t smem_address(const void* p);
bool elect_one();
void named_barrier_sync(int id, int threads);
void named_barrier_arrive(int id, int threads);
void set_registers(int n, bool increase);
void griddep_wait();
void griddep_launch_dependents();
[[noreturn]] void trap();

void fence_proxy_async(int spaces);
void thread_fence();
uint32_t atomic_load(const uint32_t* p, Order order);
void atomic_store(uint32_t* p, uint32_t v, Order order);
uint32_t atomic_add(uint32_t* p, uint32_t v, Order order);
float atomic_add(float* p, float v, Order order);
uint32_t atomic_cas(uint32_t* p, uint32_t expected, uint32_t desired, Order order);
uint4 load16(const void* p);

void mbarrier_init(uint64_t* bar, uint32_t count);
void mbarrier_invalidate(uint64_t* bar);
void fence_mbarrier_init();
void mbarrier_arrive(uint64_t* bar, uint32_t count);
void mbarrier_expect_tx(uint64_t* bar, uint32_t bytes);
void mbarrier_arrive_expect_tx(uint64_t* bar, uint32_t bytes);
bool mbarrier_try_wait(uint64_t* bar, uint32_t parity, Scope scope);
void mbarrier_wait(uint64_t* bar, uint32_t parity, Scope scope);
void mbarrier_arrive_remote(uint64_t* bar, uint32_t rank);
void mbarrier_arrive_freed(uint64_t* bar, uint32_t rank);
void mbarrier_arrive_expect_tx_remote(uint64_t* bar, uint32_t rank, uint32_t bytes);
void mbarrier_arrive_after_cp_async(uint64_t* bar);

uint32_t cluster_rank();
uint32_t cluster_size();
void cluster_arrive(Order order);
void cluster_wait();
uint32_t cluster_map(const void* p, uint32_t rank);
void st_cluster(uint32_t address, const void* v, int bytes);
void ld_cluster(uint32_t address, void* v, int bytes);
void st_async(uint32_t address, const void* v, int bytes, uint32_t bar);

void tma_prefetch(const CUtensorMap* map);
void tma_load(void* dst, const CUtensorMap* map, uint64_t* bar, int rank, int x, int y, int z, uint16_t ctas);
void tma_store(const CUtensorMap* map, const void* src, int rank, int x, int y, int z);
void bulk_load(void* dst, const void* src, uint32_t bytes, uint64_t* bar);
void bulk_store(void* dst, const void* src, uint32_t bytes);
void bulk_copy_cluster(uint32_t dst, const void* src, uint32_t bytes, uint32_t bar);
void bulk_commit();
void bulk_wait(int most, bool read);

void wgmma_fence();
void wgmma(float* d,
           int n,
           Element type,
           uint64_t a,
           bool a_mn,
           const uint32_t* a_registers,
           uint64_t b,
           bool b_mn,
           bool accumulate);
void wgmma_commit();
void wgmma_wait(int most);

void mma_m16n8k16(float* d, const uint32_t* a, const uint32_t* b, Element type);
void ldmatrix(uint32_t* r, int matrices, const void* row, bool transposed);
void stmatrix(void* row, const uint32_t* r, int matrices, bool transposed);
void cp_async_16(void* dst, const void* src, int valid);
void cp_async_commit();
void cp_async_wait(int most);

void sync_threads();
void sync_warp(uint32_t mask);
uint32_t shuffle(uint32_t mask, uint32_t v, int how, int operand);  // how: 0 index, 1 xor, 2 down, 3 up
uint32_t ballot(uint32_t mask, bool predicate);
void nanosleep();

template <class T>
T shuffle_as(uint32_t mask, T v, int how, int operand) {
  static_assert(sizeof(T) == 4, "shuffles move 4 bytes");
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  bits = shuffle(mask, bits, how, operand);
  std::memcpy(&v, &bits, 4);
  return v;
}

}  // namespace emu

#define MOLE_EMU_INLINE inline __attribute__((always_inline))
MOLE_EMU_INLINE void __syncthreads() { emu::sync_threads(); }
MOLE_EMU_INLINE void __syncwarp(unsigned mask = 0xffffffffu) { emu::sync_warp(mask); }
MOLE_EMU_INLINE void __threadfence() { emu::thread_fence(); }
MOLE_EMU_INLINE void __nanosleep(unsigned) { emu::nanosleep(); }
template <class T>
MOLE_EMU_INLINE T __shfl_sync(unsigned mask, T v, int lane) {
  return emu::shuffle_as(mask, v, 0, lane);
}
template <class T>
MOLE_EMU_INLINE T __shfl_xor_sync(unsigned mask, T v, int bits) {
  return emu::shuffle_as(mask, v, 1, bits);
}
template <class T>
MOLE_EMU_INLINE T __shfl_down_sync(unsigned mask, T v, int by) {
  return emu::shuffle_as(mask, v, 2, by);
}
template <class T>
MOLE_EMU_INLINE T __shfl_up_sync(unsigned mask, T v, int by) {
  return emu::shuffle_as(mask, v, 3, by);
}
MOLE_EMU_INLINE unsigned __ballot_sync(unsigned mask, int predicate) {
  return emu::ballot(mask, predicate != 0);
}
MOLE_EMU_INLINE int __any_sync(unsigned mask, int predicate) {
  return emu::ballot(mask, predicate != 0) != 0;
}
MOLE_EMU_INLINE int __all_sync(unsigned mask, int predicate) {
  return emu::ballot(mask, predicate == 0) == 0;
}
template <class T>
MOLE_EMU_INLINE T __ldg(const T* p) {
  return *p;
}
inline float __uint_as_float(uint32_t v) {
  float f;
  std::memcpy(&f, &v, 4);
  return f;
}
inline uint32_t __float_as_uint(float f) {
  uint32_t v;
  std::memcpy(&v, &f, 4);
  return v;
}
template <class A, class B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  return b < a ? b : a;
}
template <class A, class B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  return a < b ? b : a;
}
#undef MOLE_EMU_INLINE

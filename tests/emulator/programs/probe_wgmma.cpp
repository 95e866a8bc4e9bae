// One wgmma on a shared memory image that a test wrote: in = the image, out = d of each thread. With ra=1
// operand a is the first 2 KB of the image as each thread's four registers. with half=1 the elements are
// fp16.
#include "csrc/cuda/device/device.h"
#include "csrc/emulator/emulator.h"
#include "files.h"

namespace mole {

struct Probe {
  uint32_t a, a_leading, a_stride, b, b_leading, b_stride;
  bool accumulate;
};

template <Swizzle S>
__device__ uint64_t describe(uint32_t at, uint32_t leading, uint32_t stride) {
  return wgmma_descriptor<S>(dynamic_smem() + at, leading, stride);
}

template <class T, int N, Swizzle S, Major A, Major B, bool REGISTERS>
__global__ void probe(const uint4* image, int pieces, float* out, Probe p) {
  auto* smem = reinterpret_cast<uint4*>(dynamic_smem());
  for (int i = int(threadIdx.x); i < pieces; i += 128) smem[i] = image[i];
  uint32_t ra[4];
  for (int i = 0; i < 4; i++) ra[i] = reinterpret_cast<const uint32_t*>(image)[threadIdx.x * 4 + i];
  fence_proxy_async_shared();
  __syncthreads();
  float d[N / 2];
  for (int i = 0; i < N / 2; i++) d[i] = 1000.0f;
  wgmma_fence(d);
  const uint64_t b = describe<S>(p.b, p.b_leading, p.b_stride);
  if constexpr (REGISTERS)
    wgmma<T, B>(d, ra, b, p.accumulate);
  else
    wgmma<T, A, B>(d, describe<S>(p.a, p.a_leading, p.a_stride), b, p.accumulate);
  wgmma_commit();
  wgmma_wait<0>();
  wgmma_hold(d);
  for (int i = 0; i < N / 2; i++) out[threadIdx.x * (N / 2) + i] = d[i];
}

}  // namespace mole

using namespace mole;

template <class T, int N, Swizzle S, Major A, Major B, bool R>
int run(const emu::Arguments& args) {
  const auto image = read_file(args.text("in", ""));
  emu::Input<unsigned char> in("image", image.size());
  for (size_t i = 0; i < image.size(); i++) in[i] = image[i];
  emu::Output<float> out("out", 128 * N / 2);
  const auto u = [&](const char* name) { return uint32_t(args.get(name, 0)); };
  const Probe p{u("a"),
                u("a_leading"),
                u("a_stride"),
                u("b"),
                u("b_leading"),
                u("b_stride"),
                args.get("accumulate", 1) != 0};
  emu::Launch launch;
  launch.block = dim3(128), launch.smem = image.size(), launch.seed = args.seed();
  emu::launch(launch, [&] {
    probe<T, N, S, A, B, R>(reinterpret_cast<const uint4*>(in.data()), int(image.size() / 16), out.data(), p);
  });
  write_file(args.text("out", ""), out.data(), 128 * N / 2 * sizeof(float));
  return 0;
}

template <int N, Swizzle S, Major A, Major B>
int typed(const emu::Arguments& args) {
  if (args.get("ra", 0)) return run<bf16, N, S, Major::K, B, true>(args);
  return args.get("half", 0) ? run<fp16, N, S, A, B, false>(args) : run<bf16, N, S, A, B, false>(args);
}

template <int N, Swizzle S>
int majors(const emu::Arguments& args) {
  const bool a = args.get("a_mn", 0), b = args.get("b_mn", 0);
  if (a) return b ? typed<N, S, Major::MN, Major::MN>(args) : typed<N, S, Major::MN, Major::K>(args);
  return b ? typed<N, S, Major::K, Major::MN>(args) : typed<N, S, Major::K, Major::K>(args);
}

template <int N>
int swizzles(const emu::Arguments& args) {
  switch (args.get("swizzle", 128)) {
    case 0:
      return majors<N, Swizzle::None>(args);
    case 32:
      return majors<N, Swizzle::B32>(args);
    case 64:
      return majors<N, Swizzle::B64>(args);
    default:
      return majors<N, Swizzle::B128>(args);
  }
}

int main(int argc, char** argv) {
  const emu::Arguments args(argc, argv);
  switch (args.get("n", 64)) {
    case 8:
      return run<bf16, 8, Swizzle::B128, Major::K, Major::K, false>(args);
    case 64:
      return swizzles<64>(args);
    case 256:
      return run<bf16, 256, Swizzle::B128, Major::K, Major::K, false>(args);
    default:
      return run<fp16, 136, Swizzle::B128, Major::K, Major::K, true>(args);
  }
}

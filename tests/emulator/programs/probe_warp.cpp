// mma.sync, ldmatrix and stmatrix on registers and rows that a test wrote. in: per lane 4+2+4 words (a, b, d)
// for op=mma; 512 bytes of four matrices for op=load; per lane 4 words for op=store. out: per lane 4 words,
// or 512 bytes.
#include "csrc/cuda/device/device.h"
#include "csrc/emulator/emulator.h"
#include "files.h"

namespace mole {

template <class T>
__global__ void mma(const uint32_t* in, float* out) {
  const uint32_t* v = in + threadIdx.x * 10;
  float d[4] = {__uint_as_float(v[6]), __uint_as_float(v[7]), __uint_as_float(v[8]), __uint_as_float(v[9])};
  mma_m16n8k16<T>(d, {v[0], v[1], v[2], v[3]}, {v[4], v[5]});
  for (int i = 0; i < 4; i++) out[threadIdx.x * 4 + i] = d[i];
}

__global__ void load(const uint32_t* in, uint32_t* out, bool transposed, int count) {
  auto* smem = reinterpret_cast<uint32_t*>(dynamic_smem());
  for (uint32_t i = threadIdx.x; i < 128; i += 32) smem[i] = in[i];
  __syncwarp();
  uint32_t r[4] = {}, two[2];
  const void* row = smem + threadIdx.x * 4;
  if (count == 4 && transposed) ldmatrix_x4_trans(r, row);
  if (count == 4 && !transposed) ldmatrix_x4(r, row);
  if (count == 2 && transposed) ldmatrix_x2_trans(two, row);
  if (count == 2 && !transposed) ldmatrix_x2(two, row);
  if (count == 2) r[0] = two[0], r[1] = two[1];
  for (int i = 0; i < 4; i++) out[threadIdx.x * 4 + i] = r[i];
}

__global__ void store(const uint32_t* in, uint32_t* out, bool transposed) {
  auto* smem = reinterpret_cast<uint32_t*>(dynamic_smem());
  const uint32_t* v = in + threadIdx.x * 4;
  const uint32_t r[4] = {v[0], v[1], v[2], v[3]};
  if (transposed)
    stmatrix_x4_trans(smem + threadIdx.x * 4, r);
  else
    stmatrix_x4(smem + threadIdx.x * 4, r);
  __syncwarp();
  for (uint32_t i = threadIdx.x; i < 128; i += 32) out[i] = smem[i];
}

}  // namespace mole

int main(int argc, char** argv) {
  using namespace mole;
  const emu::Arguments args(argc, argv);
  const auto image = read_file(args.text("in", ""));
  emu::Input<uint32_t> in("in", image.size() / 4);
  std::memcpy(in.data(), image.data(), image.size());
  emu::Output<uint32_t> out("out", 128);
  emu::Launch launch;
  launch.block = dim3(32), launch.smem = 512, launch.seed = args.seed();
  const std::string op = args.text("op", "mma");
  const bool transposed = args.get("transposed", 0);
  if (op == "mma" && args.get("half", 0))
    emu::launch(launch, [&] { mma<fp16>(in.data(), reinterpret_cast<float*>(out.data())); });
  else if (op == "mma")
    emu::launch(launch, [&] { mma<bf16>(in.data(), reinterpret_cast<float*>(out.data())); });
  else if (op == "load")
    emu::launch(launch,
                [&, count = args.get("count", 4)] { load(in.data(), out.data(), transposed, count); });
  else
    emu::launch(launch, [&] { store(in.data(), out.data(), transposed); });
  write_file(args.text("out", ""), out.data(), 512);
  return 0;
}

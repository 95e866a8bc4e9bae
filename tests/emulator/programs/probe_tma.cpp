// Loads one tile and writes shared memory as it lies to `out`, or (store=1) writes a shared memory image `in`
// to a tensor and that to `out`.
#include "csrc/cuda/device/device.h"
#include "csrc/emulator/emulator.h"
#include "files.h"

namespace mole {

__global__ void load(
    const __grid_constant__ CUtensorMap map, int rank, int x, int y, int z, uint32_t bytes, uint4* out) {
  unsigned char* smem = dynamic_smem();
  auto* bar = reinterpret_cast<uint64_t*>(smem + bytes);
  if (threadIdx.x == 0) {
    mbarrier_init(bar, 1);
    fence_mbarrier_init();
    mbarrier_arrive_expect_tx(bar, bytes);
    if (rank == 2)
      tma_load_2d(smem, &map, bar, x, y);
    else
      tma_load_3d(smem, &map, bar, x, y, z);
  }
  __syncwarp();
  mbarrier_wait(bar, 0);
  for (uint32_t i = threadIdx.x; i < bytes / 16; i += 32) out[i] = reinterpret_cast<const uint4*>(smem)[i];
}

__global__ void store(
    const __grid_constant__ CUtensorMap map, int rank, int x, int y, int z, uint32_t bytes, const uint4* in) {
  unsigned char* smem = dynamic_smem();
  for (uint32_t i = threadIdx.x; i < bytes / 16; i += 32) reinterpret_cast<uint4*>(smem)[i] = in[i];
  fence_proxy_async_shared();
  __syncwarp();
  if (threadIdx.x == 0) {
    if (rank == 2)
      tma_store_2d(&map, smem, x, y);
    else
      tma_store_3d(&map, smem, x, y, z);
    bulk_commit();
    bulk_wait<0>();
  }
}

}  // namespace mole

int main(int argc, char** argv) {
  using namespace mole;
  const emu::Arguments args(argc, argv);
  const auto u = [&](const char* name, int fallback) { return uint64_t(args.get(name, fallback)); };
  const int rank = args.get("rank", 2), swizzle = args.get("swizzle", 128);
  const uint64_t size[3] = {u("sx", 64), u("sy", 8), u("sz", 1)}, pitch = u("pitch", int(size[0]));
  const uint32_t box[3] = {uint32_t(u("bx", 64)), uint32_t(u("by", 8)), uint32_t(u("bz", 1))};
  const uint32_t bytes = box[0] * box[1] * box[2] * 2;
  const uint64_t elements = pitch * size[1] * size[2];
  const auto image = read_file(args.text("in", ""));
  const bool storing = args.get("store", 0);
  emu::Memory<uint16_t> tensor("tensor", elements, 0x7777);
  emu::Memory<uint4> tile("tile", bytes / 16, uint4{});
  for (size_t i = 0; i < image.size(); i++)
    reinterpret_cast<unsigned char*>(storing ? (void*)tile.data() : (void*)tensor.data())[i] = image[i];
  const CUtensorMap map =
      rank == 2 ? emu::tensor_map_2d(tensor.data(), size[1], size[0], box[1], box[0], swizzle, pitch)
                : emu::tensor_map_3d(tensor.data(), size, {pitch * 2, pitch * 2 * size[1]}, box, swizzle);
  emu::Launch launch;
  launch.block = dim3(32), launch.smem = bytes + 16, launch.seed = args.seed();
  const int x = args.get("x", 0), y = args.get("y", 0), z = args.get("z", 0);
  if (storing)
    emu::launch(launch, [&] { store(map, rank, x, y, z, bytes, tile.data()); });
  else
    emu::launch(launch, [&] { load(map, rank, x, y, z, bytes, tile.data()); });
  if (storing)
    write_file(args.text("out", ""), tensor.data(), elements * 2);
  else
    write_file(args.text("out", ""), tile.data(), bytes);
  return 0;
}

// Launches: from operands and a tile to kernel arguments, cluster attributes and the driver's answer.
#include "launch.h"

#include "maps.h"

#include <mutex>

namespace mole::sm90::ladder {
const void* find(int step, int columns);
}

namespace mole::sm90 {

#define MOLE_BOTH_DTYPES(way)                                          \
  const void* find_##way##_bf16(const Shape&);                         \
  const void* find_##way##_fp16(const Shape&);                         \
  static const void* find_##way(const Shape& shape, bool bf16) {       \
    return bf16 ? find_##way##_bf16(shape) : find_##way##_fp16(shape); \
  }
MOLE_BOTH_DTYPES(cluster)
MOLE_BOTH_DTYPES(persistent)
MOLE_BOTH_DTYPES(recompute)
MOLE_BOTH_DTYPES(cluster_dx)
MOLE_BOTH_DTYPES(persistent_dx)
MOLE_BOTH_DTYPES(recompute_dx)
#undef MOLE_BOTH_DTYPES

const void* kernel_of(Way way, const Shape& shape, bool bf16, bool back) {
  switch (way) {
    case Way::cluster:
      return back ? find_cluster_dx(shape, bf16) : find_cluster(shape, bf16);
    case Way::persistent:
      return back ? find_persistent_dx(shape, bf16) : find_persistent(shape, bf16);
    default:
      return back ? find_recompute_dx(shape, bf16) : find_recompute(shape, bf16);
  }
}

namespace {

std::string said(const char* what, cudaError_t error) {
  return error == cudaSuccess ? "" : std::string(what) + ": " + cudaGetErrorString(error);
}

// dynamic shared memory beyond 48 KB has to be asked for, once for each kernel and device
std::string allow_shared(const void* kernel, int shared) {
  return said("cudaFuncSetAttribute",
              cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
}

struct Config {
  cudaLaunchConfig_t launch{};
  cudaLaunchAttribute attributes[2]{};
  Config(int grid, int threads, int shared, int cluster, bool cooperative, cudaStream_t stream) {
    launch.gridDim = dim3(grid);
    launch.blockDim = dim3(threads);
    launch.dynamicSmemBytes = shared;
    launch.stream = stream;
    launch.attrs = attributes;
    if (cluster > 1) {
      attributes[launch.numAttrs].id = cudaLaunchAttributeClusterDimension;
      attributes[launch.numAttrs].val.clusterDim = {unsigned(cluster), 1, 1};
      ++launch.numAttrs;
    }
    if (cooperative) {
      attributes[launch.numAttrs].id = cudaLaunchAttributeCooperative;
      attributes[launch.numAttrs].val.cooperative = 1;
      ++launch.numAttrs;
    }
  }
};

std::string encode_maps(Maps& maps, const Call& c, const Tile& t) {
  std::string error;
  const uint32_t rows = uint32_t(t.rows()) / uint32_t(t.way == Way::cluster ? t.cluster : 1);
  const auto encode = [&](CUtensorMap& map, const Operand& o, uint32_t columns, uint32_t box_rows,
                          CUtensorMapSwizzle swizzle) {
    return error.empty() && tensor_map(map, o, {columns, box_rows, 1}, swizzle, c.bf16, error);
  };
  const auto wide = CU_TENSOR_MAP_SWIZZLE_128B;
  encode(maps.x, c.x, DEPTH, rows, wide);
  encode(maps.y, c.y, 32, 64, CU_TENSOR_MAP_SWIZZLE_64B);
  if (t.back) {
    // boxes of 32 outputs, however many of them a tile takes
    const auto narrow = CU_TENSOR_MAP_SWIZZLE_64B;
    encode(maps.w, c.w, BOX, DEPTH, narrow);
    encode(maps.down, c.down, BOX, DEPTH, narrow);
    encode(maps.up, c.up, BOX, DEPTH, narrow);
    encode(maps.token_weight, c.token_weight.at ? c.token_weight : c.up, BOX, LOGIT_DEPTH, narrow);
    return error;
  }
  encode(maps.w, c.w, DEPTH, uint32_t(t.shape.columns), wide);
  encode(maps.down, c.down, DEPTH, uint32_t(t.slice), wide);
  encode(maps.token_weight, c.token_weight.at ? c.token_weight : c.down, DEPTH, LOGITS, wide);
  // as many rows of B as the expand's wgmma is wide
  encode(maps.up, c.up, DEPTH, uint32_t(t.shape.columns + (t.way == Way::persistent ? 0 : t.shape.extra)),
         wide);
  return error;
}

}  // namespace

Card card_of(int device) {
  static std::mutex guard;
  static Card known[64];
  static bool asked[64] = {};
  const std::lock_guard<std::mutex> lock(guard);
  if (device < 0 || device >= 64) return Card{};
  if (asked[device]) return known[device];
  Card card;
  cudaDeviceGetAttribute(&card.processors, cudaDevAttrMultiProcessorCount, device);
  cudaDeviceGetAttribute(&card.shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  // any kernel that fills a multiprocessor's shared memory tells how many clusters of such fit
  const Shape shape = shapes_of(Way::cluster).front();
  const void* kernel = kernel_of(Way::cluster, shape, true, false);
  allow_shared(kernel, card.shared);
  card.clusters[1] = card.processors;
  for (int c = 2; c <= 8; c *= 2) {
    Config config(c, 128 * (shape.warp_groups + 1), card.shared, c, false, nullptr);
    int count = 0;
    if (cudaOccupancyMaxActiveClusters(&count, kernel, &config.launch) != cudaSuccess) count = 0;
    card.clusters[c] = count;
  }
  // an attribute that could not be read must not be the next launch's error
  cudaGetLastError();
  asked[device] = true;
  return known[device] = card;
}

std::string launch(const Call& call, const Tile& tile) {
  const void* kernel = kernel_of(tile.way, tile.shape, call.bf16, tile.back);
  if (!kernel) return "there is no kernel for this tile";
  Maps maps;
  if (std::string error = encode_maps(maps, call, tile); !error.empty()) return error;
  Params params = call.params;
  params.row_tiles = int32_t(tile.row_tiles);
  params.column_tiles = int32_t(tile.column_tiles);
  params.slice = tile.slice;
  params.slices = tile.slices;
  params.stages = tile.stages;
  if (std::string error = allow_shared(kernel, tile.shared); !error.empty()) return error;
  // CTAs of a cluster kernel that wait for a sample's gate must all be resident: the driver refuses where
  // they cannot be
  const bool together = tile.way == Way::cluster && params.pooled;
  Config config(tile.grid, 128 * (tile.shape.warp_groups + 1), tile.shared, tile.cluster, together,
                call.stream);
  void* arguments[2] = {&maps, &params};
  const std::string failed =
      said("cudaLaunchKernelExC", cudaLaunchKernelExC(&config.launch, kernel, arguments));
  // told here, it must not be told again by the next call that asks for errors
  if (!failed.empty()) cudaGetLastError();
  return failed;
}

std::string launch_ladder(int step, const Call& call, int columns) {
  const void* kernel = step >= 1 && step <= 4 ? ladder::find(step, columns) : nullptr;
  if (!kernel || !call.bf16)
    return "the ladder has steps 1 to 4, tiles of 160 and 256 columns, and bfloat16 alone";
  const Tile tile{Way::cluster,
                  {2, columns, 0},
                  1,
                  0,
                  0,
                  0,
                  0,
                  0,
                  ceil_div(call.params.span, 128),
                  ceil_div(call.params.N, columns),
                  false,
                  0};
  Maps maps;
  std::string error;
  const auto encode = [&](CUtensorMap& map, const Operand& o, uint32_t width, uint32_t rows,
                          CUtensorMapSwizzle swizzle) {
    if (error.empty() && o.at) tensor_map(map, o, {width, rows, 1}, swizzle, true, error);
  };
  encode(maps.x, call.x, DEPTH, 128, CU_TENSOR_MAP_SWIZZLE_128B);
  encode(maps.w, call.w, DEPTH, uint32_t(columns), CU_TENSOR_MAP_SWIZZLE_128B);
  encode(maps.down, call.down, DEPTH, 128, CU_TENSOR_MAP_SWIZZLE_128B);
  encode(maps.up, call.up, DEPTH, uint32_t(columns), CU_TENSOR_MAP_SWIZZLE_128B);
  encode(maps.y, call.y, 32, 64, CU_TENSOR_MAP_SWIZZLE_64B);
  if (!error.empty()) return error;
  const Card card = card_of(call.device);
  Params params = call.params;
  params.row_tiles = int32_t(tile.row_tiles), params.column_tiles = int32_t(tile.column_tiles);
  const int stage = (128 + columns) * ROW_BYTES, rest = (step >= 3 ? 128 * columns * 2 : 0) + 256;
  params.stages = std::min(6, (card.shared - rest) / stage);
  const int shared = params.stages * stage + rest;
  if (std::string failed = allow_shared(kernel, shared); !failed.empty()) return failed;
  const int64_t tiles = tile.row_tiles * tile.column_tiles;
  Config config(int(step == 1 ? tiles : std::min<int64_t>(tiles, card.processors)), 384, shared, 1, false,
                call.stream);
  void* arguments[2] = {&maps, &params};
  return said("cudaLaunchKernelExC", cudaLaunchKernelExC(&config.launch, kernel, arguments));
}

}  // namespace mole::sm90

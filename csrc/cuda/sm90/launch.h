// The host's view of the sm_90 kernels: operands by address and stride, a tile, a stream. No torch and no
// kernel code in here.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <string>

#include "problem.h"
#include "tile.h"

namespace mole::sm90 {

// a 16-bit tensor of up to three dimensions as TMA sees it, innermost first; strides in elements of
// dimensions 1 and 2
struct Operand {
  const void* at;
  int64_t size[3];
  int64_t stride[2];
};

// of dX in its own roles: x is dY, y is dX, down is B and up is A
struct Call {
  Operand x, w, down, token_weight, up, y;  // token_weight.at null where there is no token gate
  Params params;                            // without what the tile decides
  bool bf16;
  cudaStream_t stream;
  int device;
};

// why TMA cannot take `o`, or empty: 16-byte aligned address and strides, no stride shorter than what lies
// inside it
std::string layout_refusal(const char* name, const Operand& o);

// the GPU as the tile choice sees it; asked once for each device
Card card_of(int device);

// the kernel of a tile, null where there is none
const void* kernel_of(Way way, const Shape& shape, bool bf16, bool back);

// an error message, or empty. Allocates nothing on the device; in a graph capture like any launch.
std::string launch(const Call& call, const Tile& tile);

// Step 1 to 4 of the ladder (csrc/cuda/ladder): y = x Wᵀ, from 3 on with the bias; 4 with z [M,R] · upᵀ, z in
// down's place. columns: 160 or 256, of a tile with 128 rows; bf16 only
std::string launch_ladder(int step, const Call& call, int columns);

// a tensor map from the cache, or encoded anew; false where the driver refuses
bool tensor_map(CUtensorMap& out,
                const Operand& o,
                const uint32_t (&box)[3],
                CUtensorMapSwizzle swizzle,
                bool bf16,
                std::string& error);

}  // namespace mole::sm90

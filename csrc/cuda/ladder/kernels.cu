// The ladder's kernels for a GPU: bf16, 128×256 and 128×160 tiles.
#include "../sm90/launch.h"
#include "step3_epilogue.h"

namespace mole::sm90::ladder {

template <int STEP, int BN>
__global__ void __launch_bounds__(384, 1)
    step(const __grid_constant__ Maps maps, const __grid_constant__ Params p) {
  if constexpr (STEP == 1) plain<bf16, 2, BN>(maps, p);
  if constexpr (STEP == 2) persistent<bf16, 2, BN>(maps, p);
  if constexpr (STEP == 3) epilogue<bf16, 2, BN>(maps, p);
}

// steps 3 and 4 are one kernel, with and without rank columns
const void* find(int number, int columns) {
  const void* wide[] = {reinterpret_cast<const void*>(step<1, 256>),
                        reinterpret_cast<const void*>(step<2, 256>),
                        reinterpret_cast<const void*>(step<3, 256>)};
  const void* narrow[] = {reinterpret_cast<const void*>(step<1, 160>),
                          reinterpret_cast<const void*>(step<2, 160>),
                          reinterpret_cast<const void*>(step<3, 160>)};
  const int at = number > 3 ? 2 : number - 1;
  return columns == 256 ? wide[at] : columns == 160 ? narrow[at] : nullptr;
}

}  // namespace mole::sm90::ladder

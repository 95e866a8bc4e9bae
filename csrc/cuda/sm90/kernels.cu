// The kernels of one way and dtype: compiled once for each pair, with -DMOLE_WAY=… -DMOLE_DTYPE=…
#include "persistent_kernel.h"
#include "tile.h"

namespace mole::sm90 {

template <class T, int GROUPS, int BN, int NX>
__global__ void __launch_bounds__(128 * (GROUPS + 1), 1)
    cluster(const __grid_constant__ Maps maps, const __grid_constant__ Params p) {
  tile_kernel<T, GROUPS, BN, NX, true>(maps, p);
}

template <class T, int GROUPS, int BN, int NX>
__global__ void __launch_bounds__(128 * (GROUPS + 1), 1)
    recompute(const __grid_constant__ Maps maps, const __grid_constant__ Params p) {
  tile_kernel<T, GROUPS, BN, NX, false>(maps, p);
}

template <class T, int GROUPS, int BN, int NH>
__global__ void __launch_bounds__(128 * (GROUPS + 1), 1)
    persistent(const __grid_constant__ Maps maps, const __grid_constant__ Params p) {
  persistent_kernel<T, GROUPS, BN, NH>(maps, p);
}

template <class T, int GROUPS, int BN, int NX>
__global__ void __launch_bounds__(128 * (GROUPS + 1), 1)
    cluster_dx(const __grid_constant__ Maps maps, const __grid_constant__ Params p) {
  tile_kernel<T, GROUPS, BN, NX, true, true>(maps, p);
}

template <class T, int GROUPS, int BN, int NX>
__global__ void __launch_bounds__(128 * (GROUPS + 1), 1)
    recompute_dx(const __grid_constant__ Maps maps, const __grid_constant__ Params p) {
  tile_kernel<T, GROUPS, BN, NX, false, true>(maps, p);
}

template <class T, int GROUPS, int BN, int NH>
__global__ void __launch_bounds__(128 * (GROUPS + 1), 1)
    persistent_dx(const __grid_constant__ Maps maps, const __grid_constant__ Params p) {
  persistent_kernel<T, GROUPS, BN, NH, true>(maps, p);
}

#define MOLE_PASTE(a, b, c) a##_##b##_##c
#define MOLE_NAME(way, dtype) MOLE_PASTE(find, way, dtype)

// the kernel of a shape, null where there is none
const void* MOLE_NAME(MOLE_WAY, MOLE_DTYPE)(const Shape& s) {
#define MOLE_CASE(G, BN, NX)                                  \
  if (s.warp_groups == G && s.columns == BN && s.extra == NX) \
    return reinterpret_cast<const void*>(MOLE_WAY<MOLE_DTYPE, G, BN, NX>);
  MOLE_SHAPES(MOLE_CASE)
#undef MOLE_CASE
  return nullptr;
}

}  // namespace mole::sm90

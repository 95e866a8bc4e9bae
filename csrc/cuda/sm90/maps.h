// The tensor maps of one launch. Whoever includes this has CUtensorMap already: the driver's, or the
// emulator's.
#pragma once

namespace mole::sm90 {

// x [groups,span,K], w [1,N,K], down [S,R,K], token_weight [1,E,K], up [S,N,R] in boxes of 64 columns with
// 128-byte swizzle; y [groups,span,N] in boxes of 32 columns and 64 rows with 64-byte swizzle. Of dX, with
// its roles swapped, w, down, token_weight and up have their outputs innermost, [slabs, what is summed over,
// outputs]: boxes of 32 outputs with 64-byte swizzle
struct Maps {
  CUtensorMap x, w, down, token_weight, up, y;
};

}  // namespace mole::sm90

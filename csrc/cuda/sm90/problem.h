// What a launch of an sm_90 kernel is told: sizes, tile, pointers. Plain data, the same for nvcc, the host
// compiler and the emulator.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define MOLE_BOTH __host__ __device__
#else
#define MOLE_BOTH
#endif

namespace mole::sm90 {

constexpr int MOST_EXPERTS = 16;
// one 128-byte row of a swizzled tile: 64 elements of 16 bits
constexpr int DEPTH = 64;
constexpr int ROW_BYTES = 128;
// rows of token_weight that ride along with A's: the eight columns of the narrowest wgmma
constexpr int LOGITS = 8;
// backward: columns of an output-major tile that one copy brings, rows of 64 bytes; rows of token_weight in
// its stage, the depth of one wgmma
constexpr int BOX = 32, LOGIT_DEPTH = 16;

// columns of an output-major tile as they lie in shared memory: whole boxes
MOLE_BOTH constexpr int boxed(int columns) { return (columns + BOX - 1) / BOX * BOX; }

// an operand of any floating dtype, read one number at a time; null where the call has none
enum class Kind : int32_t { f32, bf16, f16 };
struct Numbers {
  const void* at;
  Kind kind;
};

// In the backward the roles are swapped: x is dY, K its columns, N those of dX; down is B and up is A, so
// that h is V = dY·B. row tiles do not straddle groups: samples, where each has its own experts or pooled
// gate, else the whole batch is one group
struct Params {
  int32_t T, N, K, R, E;
  int32_t span, groups;   // rows of a group
  int32_t row_tiles;      // of one group
  int32_t column_tiles;   // of y
  int32_t slice, slices;  // columns of h in one tile of h, and how many of those
  int32_t sets;           // S of down and up: one for all groups, or each its own
  const int64_t*
      assignment;  // [groups] the set of each group, anything outside 0 … S−1 for none; null: as `sets` says
  int32_t token, pooled, save;  // gates present; h wanted
  int32_t top_k;  // 0: the token gate is a sigmoid; else a softmax over each row's k largest logits
  int32_t stages;
  const void* bias;  // [N] in the layer's dtype, or null
  Numbers scale, gate, token_bias, sample_weight, sample_bias;
  int64_t gate_b, gate_t, gate_e;  // strides of the given gate, 0 where it is broadcast
  int64_t pool_set;                // elements from one sample's sample_weight to the next
  void* h;                         // [M,R] ungated, in the layer's dtype; backward: as the forward saved it
  float* token_gate;               // [M,E]; backward: as the forward saved it
  void* dh;                        // backward: [M,R] γ ⊙ V in the layer's dtype, or null (not in persistent)
  float* d;            // backward: [slices,M,E] shares of D = Σ V·h over an expert's columns, or null
  float* sample_gate;  // [B,E]
  float* z;            // workspace [M,R]: gated h (persistent)
  float* parts;        // workspace [groups, row_tiles, slices, warp groups, E]: shares of the pooled logits
  uint32_t* flags;     // zeros, and left as zeros: see `Flags`
  int32_t first[MOST_EXPERTS + 1];  // first rank column of each expert, then R
};

// where a launch's counters lie in `flags`
struct Flags {
  int32_t groups, row_tiles;
  MOLE_BOTH static constexpr int ticket() { return 0; }
  MOLE_BOTH static constexpr int left() { return 1; }
  MOLE_BOTH constexpr int arrived(int group) const { return 2 + group; }
  MOLE_BOTH constexpr int gate_ready(int group) const { return 2 + groups + group; }
  MOLE_BOTH constexpr int rows_ready(int group, int tile) const {
    return 2 + 2 * groups + group * row_tiles + tile;
  }
  MOLE_BOTH constexpr int count() const { return 2 + 2 * groups + groups * row_tiles; }
};

// byte offsets in a CTA's shared memory, from a start that is a multiple of 1024
struct Shared {
  int stage, staging, z, z_pitch, parts, gamma, sums, owner, barriers, total;
};

// a stage holds `rows` of x and `loaded` rows of W (or of A, or both stacked); z_columns: of a tile of z to
// exchange, or 0; h_columns: of a tile of h, R padded: of all of them; parts: shares of D of one row, floats
// (backward with a token gate)
MOLE_BOTH constexpr Shared shared_layout(
    int rows, int columns, int loaded, int stages, int z_columns, int h_columns, int padded, int parts = 0) {
  Shared s{};
  s.stage = (rows + loaded) * ROW_BYTES;
  s.staging = stages * s.stage;
  s.z = s.staging + rows * columns * 2;
  // an odd number of 16-byte pieces: the eight rows of a fragment fall on different banks
  s.z_pitch = z_columns * 2 + 16;
  s.parts = s.z + (z_columns ? rows * s.z_pitch : 0);
  s.gamma = s.parts + rows * parts * 4;
  s.sums = s.gamma + (h_columns ? rows * (MOST_EXPERTS + 1) * 4 : 0);
  s.owner = s.sums + rows / 16 * h_columns * 4;
  s.barriers = s.owner + (padded + 3) / 4 * 16;
  s.total = s.barriers + 256;
  return s;
}

}  // namespace mole::sm90

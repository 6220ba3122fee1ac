// Tile shapes of the backward kernels, one row per head-dim bucket and shared-memory class, each with the limit that
// chose it. The planner and the kernels' traits are made from the same rows.
#pragma once

#include "variant/tiles.h"

namespace flash_attn {

// One backward kernel. Masks are run-time values: a tile that every row sees whole skips the test.
struct BackwardVariant {
  Arch arch;
  Dtype dtype;
  HeadDimBucket head_dim;
  SmemClass smem;
  Score score;

  friend constexpr bool operator==(const BackwardVariant&, const BackwardVariant&) = default;
};

// How the warps of a thread block share a matrix product.
struct WarpGrid {
  int rows;
  int cols;

  constexpr int num_warps() const { return rows * cols; }
};

struct BackwardTile {
  int m;       // query rows per step
  int n;       // keys per thread block
  int stages;  // of Q and of dO in shared memory
  // Thread blocks that share a tile of keys: each has its part of the columns of dQ, dK and dV.
  int column_blocks = 1;
  WarpGrid scores;  // of S and dP: m x n
  WarpGrid dkv;     // of dK and dV: n x columns
  WarpGrid dq;      // m x columns
};

// The scores that a row is for.
enum class ScoreSet { kAll, kPlain };

constexpr bool contains(ScoreSet set, Score score) { return set == ScoreSet::kAll || score == Score::kPlain; }

struct BackwardTileRow {
  HeadDimBucket head_dim;
  SmemClass smem;
  BackwardTile tile;
  const char* reason;
  ScoreSet scores = ScoreSet::kAll;
};

// Smallest bucket first, then most shared memory: a call takes the first row that holds it and that the GPU can hold.
inline constexpr BackwardTileRow kBackwardTilesSm80[] = {
    {{32, 32},
     SmemClass::k99KB,
     {.m = 64, .n = 128, .stages = 2, .scores = {2, 4}, .dkv = {8, 1}, .dq = {4, 2}},
     "exponentials outweigh the products"},
    {{64, 64},
     SmemClass::k163KB,
     {.m = 128, .n = 128, .stages = 2, .scores = {4, 2}, .dkv = {4, 2}, .dq = {4, 2}},
     "registers: S and dP (64 each) of 255; a general score's spill 448 bytes",
     ScoreSet::kPlain},
    {{64, 64},
     SmemClass::k99KB,
     {.m = 64, .n = 128, .stages = 2, .scores = {2, 4}, .dkv = {4, 2}, .dq = {4, 2}},
     "shared memory: 96 KB fits SM86"},
    {{96, 96},
     SmemClass::k163KB,
     {.m = 64, .n = 128, .stages = 2, .scores = {2, 4}, .dkv = {4, 2}, .dq = {4, 2}},
     "registers: dK and dV (96) + S and dP (64) of 255 per lane; with 128 rows the latter alone take 128, and two "
     "stages 208 KB"},
    {{96, 96},
     SmemClass::k99KB,
     {.m = 64, .n = 64, .stages = 2, .scores = {4, 2}, .dkv = {4, 2}, .dq = {4, 2}},
     "shared memory: 88 KB fits SM86"},
    {{128, 128},
     SmemClass::k163KB,
     {.m = 64, .n = 128, .stages = 2, .scores = {2, 4}, .dkv = {4, 2}, .dq = {2, 4}},
     "shared memory: 160 KB with two stages; registers: dK and dV take 128"},
    {{128, 128},
     SmemClass::k99KB,
     {.m = 64, .n = 64, .stages = 1, .scores = {4, 2}, .dkv = {4, 2}, .dq = {4, 2}},
     "shared memory: 80 KB fits SM86"},
    {{192, 192},
     SmemClass::k163KB,
     {.m = 64, .n = 64, .stages = 2, .scores = {4, 2}, .dkv = {2, 4}, .dq = {2, 4}},
     "shared memory: 160 KB with two stages; 128 keys take 176 KB even with one"},
    {{256, 256},
     SmemClass::k227KB,
     {.m = 64, .n = 64, .stages = 2, .scores = {4, 2}, .dkv = {2, 4}, .dq = {2, 4}},
     "shared memory: 208 KB with two stages; registers: dK and dV take 128, those of 128 keys 256"},
    {{256, 256},
     SmemClass::k163KB,
     {.m = 64, .n = 64, .stages = 1, .scores = {4, 2}, .dkv = {2, 4}, .dq = {2, 4}},
     "shared memory: 144 KB with one stage fits SM80"},
    {{512, 512},
     SmemClass::k227KB,
     {.m = 32, .n = 64, .stages = 1, .column_blocks = 2, .scores = {2, 4}, .dkv = {2, 4}, .dq = {2, 4}},
     "shared memory: 200 KB; registers: dK and dV take 128"},
    {{512, 512},
     SmemClass::k163KB,
     {.m = 32, .n = 32, .stages = 1, .column_blocks = 2, .scores = {2, 2}, .dkv = {2, 2}, .dq = {2, 2}},
     "shared memory: 132 KB fits SM80"},
};

// Row of the backward tile table for a score and a pair of head dims on a GPU with this much shared memory; nullptr if
// none fits.
constexpr const BackwardTileRow* find_backward_tile_row(Arch arch, Score score, int head_dim, int head_dim_v,
                                                        int smem_limit) {
  if (arch != Arch::kSm80) return nullptr;
  for (const BackwardTileRow& row : kBackwardTilesSm80) {
    const bool holds = head_dim <= row.head_dim.qk && head_dim_v <= row.head_dim.v;
    if (holds && contains(row.scores, score) && bytes_of(row.smem) <= smem_limit) return &row;
  }
  return nullptr;
}

constexpr BackwardTile tile_for(const BackwardVariant& variant) {
  return find_backward_tile_row(variant.arch, variant.score, variant.head_dim.qk, variant.head_dim.v,
                                bytes_of(variant.smem))
      ->tile;
}

constexpr int num_threads(const BackwardTile& tile) { return tile.scores.num_warps() * kThreadsPerWarp; }

// The stages of Q and dO, K, V, and P and dS, which go from one product to the next.
constexpr int smem_bytes(const BackwardVariant& variant) {
  const BackwardTile tile = tile_for(variant);
  const HeadDimBucket d = variant.head_dim;
  return ((tile.stages * tile.m + tile.n) * (d.qk + d.v) + 2 * tile.m * tile.n) * kElementBytes;
}

}  // namespace flash_attn

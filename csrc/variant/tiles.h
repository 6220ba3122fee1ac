// Tile shapes of the forward kernels, one row per head-dim bucket, each with the limit that chose it. The planner and
// the kernels' traits are made from the same rows.
#pragma once

#include "variant/variant.h"

namespace flash_attn {

struct Tile {
  int m;          // query rows per thread block
  int n;          // keys per step
  int num_warps;  // each warp owns m / num_warps rows
};

struct TileRow {
  HeadDimBucket head_dim;
  Tile tile;
  const char* reason;
};

// Smallest bucket first: the first row that holds a call is the one it takes.
inline constexpr TileRow kForwardTilesSm80[] = {
    {{32, 32}, {128, 128, 4}, "exponentials, not matrix products, take the time; shared memory 24 KB"},
    {{64, 64},
     {128, 128, 4},
     "registers: S (128) + O (64) of 255 per lane; shared memory 48 KB lets two blocks share an SM"},
    {{96, 96},
     {128, 64, 4},
     "registers: S (64) + O (96) of 255 per lane; shared memory 48 KB lets two blocks share an SM"},
    {{128, 128},
     {128, 64, 4},
     "registers: S (64) + O (128) of 255 per lane, n = 128 would spill; shared memory 64 KB, two blocks on SM80 and "
     "SM90, one on SM86"},
    {{192, 128},
     {128, 64, 8},
     "registers: two row halves over 8 warps, S (32) + O (64); shared memory 88 KB fits SM86's 99 KB"},
    {{192, 192},
     {128, 64, 8},
     "registers: two row halves over 8 warps, S (32) + O (96); shared memory 96 KB fits SM86's 99 KB"},
    {{256, 256},
     {64, 64, 4},
     "registers: S (32) + O (128) of 255 per lane; shared memory 96 KB fits SM86's 99 KB, two blocks on SM90"},
};

inline constexpr int kThreadsPerWarp = 32;
inline constexpr int kElementBytes = 2;

// Row of the forward tile table that a pair of head dims takes; nullptr if none holds it.
constexpr const TileRow* find_tile_row(Arch arch, int head_dim, int head_dim_v) {
  if (arch != Arch::kSm80) return nullptr;
  for (const TileRow& row : kForwardTilesSm80) {
    if (head_dim <= row.head_dim.qk && head_dim_v <= row.head_dim.v) return &row;
  }
  return nullptr;
}

constexpr Tile tile_for(const Variant& variant) {
  return find_tile_row(variant.arch, variant.head_dim.qk, variant.head_dim.v)->tile;
}

constexpr int num_threads(const Tile& tile) { return tile.num_warps * kThreadsPerWarp; }

// Q, one stage of K and one of V; O leaves through Q's space.
constexpr int smem_bytes(const Variant& variant) {
  const Tile tile = tile_for(variant);
  const HeadDimBucket d = variant.head_dim;
  const int q_or_o = tile.m * (d.qk > d.v ? d.qk : d.v);
  return (q_or_o + tile.n * (d.qk + d.v)) * kElementBytes;
}

}  // namespace flash_attn

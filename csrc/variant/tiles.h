// Tile shapes of the forward kernels, one row per head-dim bucket, each with the limit that chose it. The planner and
// the kernels' traits are made from the same rows.
#pragma once

#include <cstdint>
#include <span>

#include "variant/rounding.h"
#include "variant/variant.h"

namespace flash_attn {

// SM90: what the warpgroups of a thread block take turns in.
enum class Turn { kProducts, kExponentials, kNone };

// SM90: where Q is for the products with K. In registers it costs head_dim / 4 of a lane's, and the tensor cores read
// shared memory for K alone.
enum class QueriesIn { kSharedMemory, kRegisters };

struct Tile {
  int m;        // query rows per thread block
  int n;        // keys per step
  int warps_m;  // each owns m / warps_m rows
  // SM80: warps that share rows, each with 1 / warps_n of S's and of O's columns. SM90: warpgroups that do, each with
  // 1 / warps_n of O's columns; the first of them computes S.
  int warps_n = 1;
  // SM90: how many tiles of K, and of V, and how many of Q are in shared memory at a time.
  int kv_stages = 1;
  int q_stages = 1;
  // SM90: what benchmarks/tune_sm90.py varies. No row departs from these defaults yet.
  int polynomial_exps = 0;  // of 16 exponentials, those computed by a polynomial
  int rescale_slack = 0;    // by how many powers of two a row's maximum may grow before O is rescaled to it
  Turn turn = Turn::kProducts;
  // SM90: thread blocks with neighbouring tiles of rows that bring each other half of what they need of K and V.
  int cluster = 1;
  QueriesIn queries = QueriesIn::kSharedMemory;

  constexpr int num_warps() const { return warps_m * warps_n; }
  constexpr int cluster_rows() const { return m * cluster; }
};

// The masks that a row is for.
enum class MaskSet { kAll, kFullAndCausal, kGeneral };

constexpr bool contains(MaskSet set, Mask mask) {
  return set == MaskSet::kAll || (set == MaskSet::kGeneral) == (mask == Mask::kGeneral);
}

struct TileRow {
  HeadDimBucket head_dim;
  SmemClass smem;
  Tile tile;
  const char* reason;
  MaskSet masks = MaskSet::kAll;
};

// Smallest bucket first, then most shared memory: a call takes the first row that holds it and that the GPU can hold.
// Figures are bf16 TFLOP/s on an H200, length 8192, full and causal (docs/performance-notes.md).
inline constexpr TileRow kForwardTilesSm80[] = {
    {{32, 32},
     SmemClass::k99KB,
     {.m = 128, .n = 128, .warps_m = 4},
     "issue slots: exponentials outweigh the matrix products; n = 64 is slower, 230 for 242 full"},
    {{64, 64},
     SmemClass::k99KB,
     {.m = 128, .n = 128, .warps_m = 4},
     "registers: S (128) + O (64) of 255 per lane; n = 64 leaves fewer products per barrier, 304 for 333 full"},
    {{96, 96},
     SmemClass::k99KB,
     {.m = 128, .n = 64, .warps_m = 4},
     "registers: S (64) + O (96) of 255 per lane; n = 96 spills and gains nothing"},
    {{128, 128},
     SmemClass::k99KB,
     {.m = 128, .n = 64, .warps_m = 4},
     "registers: S (64) + O (128) of 255 per lane; n = 32 is slower, 329 for 373 full; shared memory 64 KB, two blocks "
     "on SM80 and SM90, one on SM86"},
    {{192, 128}, SmemClass::k99KB, {.m = 64, .n = 64, .warps_m = 4}, "as 192/192, which it shares K's tile with"},
    {{192, 192},
     SmemClass::k99KB,
     {.m = 64, .n = 64, .warps_m = 4},
     "two blocks on an SM hide each other's barriers: 314 full, where one of 128 rows and 8 warps has 283; 72 KB fits "
     "SM86"},
    {{256, 256},
     SmemClass::k99KB,
     {.m = 64, .n = 64, .warps_m = 4},
     "as 192/192: 330 full, where 128 rows and 8 warps have 295; shared memory 96 KB fits SM86's 99 KB"},
    {{512, 512},
     SmemClass::k227KB,
     {.m = 64, .n = 64, .warps_m = 2, .warps_n = 4},
     "registers: O (128) leaves no more than 64 rows; shared memory 201 KB. Reading Q, K and V from it is the limit, "
     "which splitting columns over four warps, rather than rows, lowers"},
    {{512, 512},
     SmemClass::k163KB,
     {.m = 64, .n = 32, .warps_m = 4, .warps_n = 2},
     "as above with half the keys a step: 133 KB for SM80"},
    {{576, 512}, SmemClass::k227KB, {.m = 64, .n = 64, .warps_m = 2, .warps_n = 4}, "as 512/512: 217 KB"},
    {{576, 512}, SmemClass::k163KB, {.m = 64, .n = 32, .warps_m = 4, .warps_n = 2}, "as 512/512: 145 KB for SM80"},
};

// Rows::k64: as much of a tile as a few heads with a few queries each fill, still two blocks on an SM.
inline constexpr TileRow kForwardTiles64Sm80[] = {
    {{64, 64}, SmemClass::k99KB, {.m = 64, .n = 128, .warps_m = 4}, "as the large tile: fewer barriers per key"},
    {{128, 128},
     SmemClass::k99KB,
     {.m = 64, .n = 64, .warps_m = 4},
     "shared memory 48 KB: four blocks on an SM90, which hide each other"},
    {{256, 256}, SmemClass::k99KB, {.m = 64, .n = 64, .warps_m = 4}, "the large tile itself"},
    {{512, 512}, SmemClass::k227KB, {.m = 64, .n = 64, .warps_m = 2, .warps_n = 4}, "the large tile itself"},
    {{512, 512}, SmemClass::k163KB, {.m = 64, .n = 32, .warps_m = 4, .warps_n = 2}, "the large tile itself"},
    {{576, 512}, SmemClass::k227KB, {.m = 64, .n = 64, .warps_m = 2, .warps_n = 4}, "the large tile itself"},
    {{576, 512}, SmemClass::k163KB, {.m = 64, .n = 32, .warps_m = 4, .warps_n = 2}, "the large tile itself"},
};

// Rows::k16: one instruction's rows, for decoding. What counts is bytes on their way from memory: warps share the rows
// and split keys and columns, so that accumulators are small and shared memory limits how many blocks an SM holds.
inline constexpr TileRow kForwardTiles16Sm80[] = {
    {{64, 64},
     SmemClass::k99KB,
     {.m = 16, .n = 128, .warps_m = 1, .warps_n = 4},
     "38 KB: K and V of 32 KB on their way in each of five blocks"},
    {{128, 128}, SmemClass::k99KB, {.m = 16, .n = 64, .warps_m = 1, .warps_n = 4}, "38 KB, as above"},
    {{256, 256},
     SmemClass::k99KB,
     {.m = 16, .n = 64, .warps_m = 1, .warps_n = 4},
     "74 KB: 64 KB on their way in each of three blocks"},
    {{512, 512},
     SmemClass::k163KB,
     {.m = 16, .n = 64, .warps_m = 1, .warps_n = 4},
     "146 KB: 128 KB on their way in one block; half the keys would leave two warps without any"},
    {{576, 512}, SmemClass::k163KB, {.m = 16, .n = 64, .warps_m = 1, .warps_n = 4}, "157 KB, as above"},
};

// Thread blocks of a cluster where the head dim allows two. 1 until a GPU has said which is faster; the other is built
// with -DFLASH_ATTN_SM90_CLUSTER=2 (docs/sm90-schedules.md).
#ifndef FLASH_ATTN_SM90_CLUSTER
#define FLASH_ATTN_SM90_CLUSTER 1
#endif

constexpr Tile clustered(Tile tile) {
  tile.cluster = FLASH_ATTN_SM90_CLUSTER;
  return tile;
}

// A warpgroup owns 64 rows of S and of O; one more warpgroup, one thread of which is active, loads the tiles.
inline constexpr TileRow kForwardTilesSm90[] = {
    {{32, 32},
     SmemClass::k227KB,
     {.m = 192, .n = 128, .warps_m = 12, .kv_stages = 2, .q_stages = 2},
     "exponentials: twice the matrix products' time, whatever the tile; three warpgroups keep them busy"},
    {{64, 64},
     SmemClass::k227KB,
     {.m = 192, .n = 128, .warps_m = 12, .kv_stages = 2, .q_stages = 2},
     "registers: S (64) + O (32) + P (32) of 160 per lane; three warpgroups take turns at the tensor cores",
     MaskSet::kFullAndCausal},
    {{64, 64},
     SmemClass::k227KB,
     {.m = 128, .n = 128, .warps_m = 8, .kv_stages = 2, .q_stages = 2},
     "as above, but for what a window's edges and a general score need beside: 160 registers spill, 240 don't",
     MaskSet::kGeneral},
    {{80, 96},
     SmemClass::k227KB,
     {.m = 128, .n = 128, .warps_m = 8, .kv_stages = 2, .q_stages = 2},
     "as 96/96, which has one step more in Q K'"},
    {{96, 96}, SmemClass::k227KB, {.m = 128, .n = 128, .warps_m = 8, .kv_stages = 2, .q_stages = 2}, "as 128/128"},
    {{128, 128},
     SmemClass::k227KB,
     clustered({.m = 128, .n = 128, .warps_m = 8, .kv_stages = 2, .q_stages = 2}),
     "registers: S (64) + O (64) + P (32) of 240 per lane"},
    {{160, 160},
     SmemClass::k227KB,
     {.m = 128, .n = 128, .warps_m = 8, .kv_stages = 2},
     "shared memory: 201 KB with one stage of Q"},
    {{192, 128},
     SmemClass::k227KB,
     {.m = 128, .n = 128, .warps_m = 8, .kv_stages = 2},
     "shared memory: 209 KB with one stage of Q"},
    {{192, 192},
     SmemClass::k227KB,
     {.m = 128, .n = 112, .warps_m = 8, .kv_stages = 2},
     "shared memory: 217 KB with one stage of Q"},
    {{256, 256},
     SmemClass::k227KB,
     clustered({.m = 128, .n = 80, .warps_m = 8, .kv_stages = 2}),
     "shared memory: 225 KB with one stage of Q; registers: O (128) + S (40) + P (20)"},
    {{64, 512},
     SmemClass::k227KB,
     {.m = 64, .n = 64, .warps_m = 4, .warps_n = 2, .kv_stages = 2},
     "as 512/512; K is narrow enough for two stages of it and of V: 225 KB"},
    {{512, 512},
     SmemClass::k227KB,
     clustered({.m = 64, .n = 64, .warps_m = 4, .warps_n = 2}),
     "registers: a group's half of O (128) leaves 64 rows; shared memory: 209 KB with one stage of everything"},
    {{576, 512}, SmemClass::k227KB, {.m = 64, .n = 64, .warps_m = 4, .warps_n = 2}, "as 512/512: 225 KB"},
};

inline constexpr int kThreadsPerWarp = 32;
inline constexpr int kThreadsPerWarpgroup = 128;
inline constexpr int kElementBytes = 2;
// Rows are read and written in pieces of 16 bytes.
inline constexpr int kVectorBytes = 16;
inline constexpr int kVectorElements = kVectorBytes / kElementBytes;
inline constexpr int kFloatBytes = 4;
// Most parts of a tile's keys, which bounds the grid and the workspace.
inline constexpr int kMaxSplits = 256;
// Rows of a sequence, or of heads packed together: the end of the last tile is an int, too.
inline constexpr int64_t kMaxRows = (int64_t{1} << 31) - 1024;

// The table of one class, smallest bucket first.
constexpr std::span<const TileRow> forward_tile_rows(Arch arch, Rows rows) {
  if (arch == Arch::kSm90) {
    if (rows != Rows::kMany) return {};
    return kForwardTilesSm90;
  }
  switch (rows) {
    case Rows::kMany:
      return kForwardTilesSm80;
    case Rows::k64:
      return kForwardTiles64Sm80;
    default:
      return kForwardTiles16Sm80;
  }
}

// Row of the forward tile tables that a mask and a pair of head dims take on a GPU whose thread blocks have
// `smem_limit` bytes of shared memory; nullptr if none holds it.
constexpr const TileRow* find_tile_row(Arch arch, Rows rows, Mask mask, int head_dim, int head_dim_v, int smem_limit) {
  for (const TileRow& row : forward_tile_rows(arch, rows)) {
    const bool holds = head_dim <= row.head_dim.qk && head_dim_v <= row.head_dim.v;
    if (holds && contains(row.masks, mask) && bytes_of(row.smem) <= smem_limit) return &row;
  }
  return nullptr;
}

constexpr Tile tile_for(const Variant& variant) {
  return find_tile_row(variant.arch, variant.rows, variant.mask, variant.head_dim.qk, variant.head_dim.v,
                       bytes_of(variant.smem))
      ->tile;
}

// SM90: rows of one TMA box when K and V are paged: the largest power of two that divides both the page size and
// tile_n.
constexpr int page_box_rows(int page_size, int tile_n) {
  const int of_page = page_size & -page_size;
  const int of_tile = tile_n & -tile_n;
  return of_page < of_tile ? of_page : of_tile;
}
// Every tile of keys has a multiple of so many. Smaller boxes would take the producer longer to start than the
// consumers to use, and the swizzle's pattern, which a box has to begin with, repeats after 8 rows.
inline constexpr int kLeastPageBoxRows = 16;

constexpr int num_threads(Arch arch, const Tile& tile) {
  return tile.num_warps() * kThreadsPerWarp + (arch == Arch::kSm90 ? kThreadsPerWarpgroup : 0);
}

// For the barriers of an SM90 kernel and the factors of shared rows: a multiple of what the tiles beside them are
// aligned to.
inline constexpr int kBarrierBytesSm90 = 1024;
// Stages of P between warpgroups that share rows.
inline constexpr int kProbabilityStagesSm90 = 2;

// Columns of a row of Q or K in shared memory, which is made of blocks of 32 or 64.
constexpr int smem_cols(int head_dim) { return round_up(head_dim, 32); }

// Q, K and V; O leaves through Q's space. Warps that share rows exchange P and the rows' maxima.
constexpr int smem_bytes(Arch arch, HeadDimBucket d, const Tile& tile) {
  const int cols = smem_cols(d.qk);
  const int q_or_o = tile.q_stages * tile.m * (cols > d.v ? cols : d.v);
  const int tiles = (q_or_o + tile.kv_stages * tile.n * (cols + d.v)) * kElementBytes;
  const bool shares_rows = tile.warps_n > 1;
  if (arch == Arch::kSm90) {
    const int exchange = shares_rows ? kProbabilityStagesSm90 * tile.m * tile.n * kElementBytes : 0;
    return tiles + exchange + kBarrierBytesSm90;
  }
  const int exchange = shares_rows ? tile.m * tile.n * kElementBytes + tile.warps_n * tile.m * kFloatBytes : 0;
  return tiles + exchange;
}

constexpr int smem_bytes(const Variant& variant) {
  return smem_bytes(variant.arch, variant.head_dim, tile_for(variant));
}

}  // namespace flash_attn

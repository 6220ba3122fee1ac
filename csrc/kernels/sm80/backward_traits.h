// Everything about an SM80 backward kernel that is known when it is compiled, derived once from its tile row.
#pragma once

#include "kernels/common/element.h"
#include "kernels/sm80/row_access.h"
#include "kernels/sm80/warp_mma.h"
#include "variant/backward_tiles.h"

namespace flash_attn::sm80 {

using namespace cute;

template <BackwardVariant kVariantValue>
struct BackwardTraits {
  static constexpr BackwardVariant kVariant = kVariantValue;
  static constexpr BackwardTile kTile = tile_for(kVariant);
  static constexpr Score kScore = kVariant.score;
  static constexpr int kTileM = kTile.m;
  static constexpr int kTileN = kTile.n;
  static constexpr int kStages = kTile.stages;
  static constexpr int kHeadDim = kVariant.head_dim.qk;
  static constexpr int kHeadDimV = kVariant.head_dim.v;
  static constexpr int kColumnBlocks = kTile.column_blocks;
  static constexpr int kColumns = kHeadDim / kColumnBlocks;    // of dQ and dK
  static constexpr int kColumnsV = kHeadDimV / kColumnBlocks;  // of dV
  static constexpr int kNumThreads = num_threads(kTile);

  using Element = ElementOf<kVariant.dtype>;

  template <WarpGrid kGrid>
  using Mma = WarpMma<kVariant.dtype, kGrid.rows, kGrid.cols>;
  using MmaScores = Mma<kTile.scores>;
  using MmaDkv = Mma<kTile.dkv>;
  using MmaDq = Mma<kTile.dq>;
  static constexpr int kScoreWarpsN = kTile.scores.cols;
  static constexpr int kRowsPerLane = 2 * kTileM / MmaScores::kRowStep;

  static_assert(kTile.dkv.num_warps() == kTile.scores.num_warps() && kTile.dq.num_warps() == kTile.scores.num_warps(),
                "every warp has a part of each product");

  using TileQ = SmemTile<kTileM, kHeadDim>;
  using TileDout = SmemTile<kTileM, kHeadDimV>;
  using TileK = SmemTile<kTileN, kHeadDim>;
  using TileV = SmemTile<kTileN, kHeadDimV>;
  using TileScores = SmemTile<kTileM, kTileN>;  // P and dS
  // This thread block's columns.
  using ColumnsQ = SmemTile<kTileM, kColumns>;
  using ColumnsDout = SmemTile<kTileM, kColumnsV>;
  using ColumnsK = SmemTile<kTileN, kColumns>;

  static_assert(TileQ::kBlockCols == ColumnsQ::kBlockCols && TileDout::kBlockCols == ColumnsDout::kBlockCols,
                "a thread block's columns are no whole blocks of the tile's");

  struct SharedStorage {
    alignas(128) Element q[kStages][kTileM * kHeadDim];
    alignas(128) Element dout[kStages][kTileM * kHeadDimV];
    alignas(128) Element k[kTileN * kHeadDim];
    alignas(128) Element v[kTileN * kHeadDimV];
    alignas(128) Element p[kTileM * kTileN];
    alignas(128) Element ds[kTileM * kTileN];
  };
  static_assert(sizeof(SharedStorage) == smem_bytes(kVariant), "the planner and the kernel disagree on shared memory");
  static_assert(sizeof(SharedStorage) <= bytes_of(kVariant.smem), "the tile doesn't fit the GPUs that its row is for");

  template <int kCols>
  using Access = RowAccess<Element, kNumThreads, kCols>;

  // The (row, column) within the tile of each score that this lane holds.
  static CUTE_DEVICE auto score_coords() { return MmaScores::template coords<kTileM, kTileN>(threadIdx.x); }
};

// First element of a column block's part of a tile, which SmemTile's blocks of columns keep in one piece.
template <int kRows, int kCols, class Element>
CUTE_DEVICE Element* columns_of(Element* tile, int column_block) {
  return tile + column_block * kRows * kCols;
}

}  // namespace flash_attn::sm80

// Everything about an SM90 forward kernel that is known when it is compiled, derived once from its tile row.
#pragma once

#include <cute/tensor.hpp>
#include <type_traits>

#include "kernels/common/element.h"
#include "kernels/common/smem_tile.h"
#include "kernels/sm90/barriers.h"
#include "kernels/sm90/cluster.h"
#include "kernels/sm90/tile_id.h"
#include "kernels/sm90/wgmma_shapes.h"
#include "variant/tiles.h"

namespace flash_attn::sm90 {

using namespace cute;

template <Variant kVariantValue, Tile kTileValue = tile_for(kVariantValue)>
struct ForwardTraits {
  static constexpr Variant kVariant = kVariantValue;
  static constexpr Tile kTile = kTileValue;
  static constexpr Mask kMask = kVariant.mask;
  static constexpr Score kScore = kVariant.score;
  static constexpr int kTileM = kTile.m;
  static constexpr int kTileN = kTile.n;
  static constexpr int kHeadDim = smem_cols(kVariant.head_dim.qk);
  static constexpr int kScoreSteps = kVariant.head_dim.qk / 16;  // of Q K': a product takes 16 columns
  static_assert(kVariant.head_dim.qk % 16 == 0);
  static constexpr int kHeadDimV = kVariant.head_dim.v;
  static constexpr int kKvStages = kTile.kv_stages;
  static constexpr int kQStages = kTile.q_stages;
  // Neighbouring tiles of rows, of one head, that visit the same keys together.
  using Cluster = ClusterOf<kTile.cluster>;
  static_assert(Cluster::kNumBlocks == kTile.cluster, "a cluster has one block or two");
  static constexpr int kClusterM = kTile.cluster_rows();

  using Element = ElementOf<kVariant.dtype>;

  // ---- threads: one warpgroup loads the tiles, the others own 64 rows of O each, or some columns of the same 64 rows
  static constexpr int kRowGroups = kTile.warps_m * kThreadsPerWarp / kThreadsPerWarpgroup;
  static constexpr int kColumnGroups = kTile.warps_n;
  static constexpr int kNumConsumerGroups = kRowGroups * kColumnGroups;
  static constexpr int kNumThreads = num_threads(kVariant.arch, kTile);
  static constexpr int kGroupRows = kTileM / kRowGroups;
  static constexpr int kGroupCols = kHeadDimV / kColumnGroups;
  // The rows, and the columns of O, that a consumer group owns.
  static constexpr int row_group_of(int group) { return kColumnGroups == 1 ? group : 0; }
  static constexpr int column_group_of(int group) { return kColumnGroups == 1 ? 0 : group; }
  static constexpr int kRowsPerLane = 2;
  static_assert(kGroupRows == 64, "a warpgroup's matrix product has 64 rows");
  static_assert(kRowGroups == 1 || kColumnGroups == 1, "no schedule shares rows among some groups only");

  // A launch gives each thread the same share of the SM's 64 K registers, in steps of eight. What the producer gives up
  // goes to the consumers; if they took more than that, they would wait for ever. The sums count one lane of each
  // warpgroup. The producer of a cluster spills with 24.
  static constexpr int kNumGroups = kNumConsumerGroups + 1;
  static constexpr int kRegistersOfAllGroups = 65536 / kNumThreads / 8 * 8 * kNumGroups;
  static constexpr int kMinProducerRegisters = Cluster::kNumBlocks == 1 ? 24 : 32;
  static constexpr int kConsumerRegisters =
      (kRegistersOfAllGroups - kMinProducerRegisters) / kNumConsumerGroups / 8 * 8;
  static constexpr int kProducerRegisters = kRegistersOfAllGroups - kNumConsumerGroups * kConsumerRegisters;

  // ---- matrix products: S = Q K' from shared memory or with Q in registers, O += P V with P in registers, or, where
  // another group computed it, in shared memory
  using TileQK = Shape<Int<kTileM>, Int<kTileN>, Int<kHeadDim>>;
  using TilePV = Shape<Int<kTileM>, Int<kGroupCols>, Int<kTileN>>;
  using GroupLayout = Layout<Shape<Int<kRowGroups>, _1, _1>>;
  static constexpr bool kQueriesInRegisters = kTile.queries == QueriesIn::kRegisters;
  using TiledMmaQK =
      decltype(make_tiled_mma(select_score_product<Element, TileQK, kQueriesInRegisters>(), GroupLayout{}));
  static_assert(kTileN / 2 + kTileN / 4 + kGroupCols / 2 + (kQueriesInRegisters ? kHeadDim / 4 : 0) <
                    kConsumerRegisters,
                "S, P, O and Q don't fit a lane");
  using TiledMmaPV = decltype(make_tiled_mma(select_output_product<Element, TilePV>(), GroupLayout{}));
  using TiledMmaSharedPV = decltype(make_tiled_mma(
      GMMA::ss_op_selector<Element, Element, float, TilePV, GMMA::Major::K, GMMA::Major::MN>(), GroupLayout{}));

  // ---- shared memory: a tile is a row of boxes, each as wide as the swizzle's 64 or 128 bytes
  template <int kCols>
  static constexpr int kBoxCols = block_cols(kCols);
  template <int kCols>
  using AtomK =
      std::conditional_t<kBoxCols<kCols> == 64, GMMA::Layout_K_SW128_Atom<Element>, GMMA::Layout_K_SW64_Atom<Element>>;
  template <int kCols>
  using AtomMN = std::conditional_t<kBoxCols<kCols> == 64, GMMA::Layout_MN_SW128_Atom<Element>,
                                    GMMA::Layout_MN_SW64_Atom<Element>>;
  template <int kRows, int kCols, int kStages>
  using SmemLayout = decltype(tile_to_shape(AtomK<kCols>{}, Shape<Int<kRows>, Int<kCols>, Int<kStages>>{}));

  using SmemLayoutQ = SmemLayout<kTileM, kHeadDim, kQStages>;
  using SmemLayoutK = SmemLayout<kTileN, kHeadDim, kKvStages>;
  // V seen as (columns, keys, stage), which is how the second product reads it. A group's columns are a tile of it.
  using SmemLayoutVt = decltype(tile_to_shape(
      AtomMN<kGroupCols>{}, Shape<Int<kHeadDimV>, Int<kTileN>, Int<kKvStages>>{}, Step<_2, _1, _3>{}));
  using GroupTileVt = Shape<Int<kGroupCols>, Int<kTileN>>;
  static_assert(kColumnGroups == 1 || kQStages == 1,
                "the last factors are written again only after Q's one stage has come back");
  static_assert(kBoxCols<kHeadDim> == kBoxCols<kGroupCols> && (kColumnGroups > 1 || kHeadDimV <= kHeadDim),
                "a group's part of O must lie within its part of Q, unless Q has been read before any O is written");

  // K comes in slices of columns with a barrier each where there is one stage only: the next tile's slices arrive while
  // the last ones of this are still in use.
  static constexpr int kKSlices = kKvStages > 1 ? 1 : kHeadDim % (4 * kBoxCols<kHeadDim>) == 0 ? 4 : 3;
  static constexpr int kKSliceCols = kHeadDim / kKSlices;
  static_assert(kKSliceCols % (kBoxCols<kHeadDim> * Cluster::kNumBlocks) == 0 &&
                    kGroupCols % (kBoxCols<kGroupCols> * Cluster::kNumBlocks) == 0,
                "the blocks of a cluster bring as many boxes each");
  static constexpr int kQBytes = kTileM * kHeadDim * sizeof(Element);
  static constexpr int kKSliceBytes = kTileN * kKSliceCols * sizeof(Element);
  static constexpr int kVSliceBytes = kTileN * kGroupCols * sizeof(Element);

  static constexpr int kSwizzleBytes = 1024;
  // From the group that computes the softmax to the one that shares its rows: for each stage P and the factors that
  // rescale the rows of O before P V is added; at the end, the rows' last factors. The factors lie beside the barriers,
  // in what these leave of kBarrierBytesSm90.
  static constexpr int kPStages = kProbabilityStagesSm90;
  struct Exchange {
    alignas(kSwizzleBytes) Element p[kPStages][kTileM * kTileN];
  };
  struct NoExchange {};
  struct RowFactors {
    float of_stage[kPStages][kTileM];
    float last[kTileM];
  };
  struct NoRowFactors {};
  // The producer may announce a tile while the consumers are at the one before it.
  static constexpr int kTileIdStages = 2;
  struct Barriers {
    Stages<kTileIdStages> tile_ids;
    TileId tile_id[kTileIdStages];
    Stages<kQStages> q;
    Stages<kKvStages * kKSlices, Cluster> k;
    Stages<kKvStages, Cluster> v[kColumnGroups];
    std::conditional_t<(kColumnGroups > 1), RowFactors, NoRowFactors> row_factors;
  };
  struct SharedStorage : std::conditional_t<(kColumnGroups > 1), Exchange, NoExchange> {
    alignas(kSwizzleBytes) Element q_or_o[kQStages][kTileM * (kHeadDim > kHeadDimV ? kHeadDim : kHeadDimV)];
    alignas(kSwizzleBytes) Element k[kKvStages][kTileN * kHeadDim];
    alignas(kSwizzleBytes) Element v[kKvStages][kTileN * kHeadDimV];
    alignas(kSwizzleBytes) Barriers barriers;
  };
  static_assert(sizeof(SharedStorage) == smem_bytes(kVariant.arch, kVariant.head_dim, kTile),
                "the planner and the kernel disagree on shared memory");
  static_assert(sizeof(SharedStorage) <= bytes_of(kVariant.smem), "the tile doesn't fit the GPUs that its row is for");
};

}  // namespace flash_attn::sm90

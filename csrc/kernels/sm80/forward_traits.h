// Everything about an SM80 forward kernel that is known when it is compiled, derived once from its tile row.
#pragma once

#include "kernels/common/element.h"
#include "kernels/sm80/row_access.h"
#include "kernels/sm80/warp_mma.h"
#include "variant/tiles.h"

namespace flash_attn::sm80 {

using namespace cute;

template <Variant kVariantValue>
struct ForwardTraits {
  static constexpr Variant kVariant = kVariantValue;
  static constexpr Tile kTile = tile_for(kVariant);
  static constexpr Mask kMask = kVariant.mask;
  static constexpr Score kScore = kVariant.score;
  static constexpr bool kFewRows = kVariant.rows != Rows::kMany;
  static constexpr int kTileM = kTile.m;
  static constexpr int kTileN = kTile.n;
  static constexpr int kHeadDim = kVariant.head_dim.qk;
  static constexpr int kHeadDimV = kVariant.head_dim.v;
  static constexpr int kWarpsM = kTile.warps_m;
  static constexpr int kWarpsN = kTile.warps_n;
  static constexpr int kNumThreads = num_threads(kVariant.arch, kTile);

  using Element = ElementOf<kVariant.dtype>;

  using Mma = WarpMma<kVariant.dtype, kWarpsM, kWarpsN>;
  static constexpr int kRowsPerLane = 2 * kTileM / Mma::kRowStep;

  using TileQ = SmemTile<kTileM, kHeadDim>;
  using TileK = SmemTile<kTileN, kHeadDim>;
  using TileV = SmemTile<kTileN, kHeadDimV>;
  using TileP = SmemTile<kTileM, kTileN>;

  // Between warps that share rows: P, which each reads whole, and the rows' maxima and sums.
  struct Exchange {
    alignas(128) Element p[kTileM * kTileN];
    float reduction[kWarpsN * kTileM];
  };
  struct NoExchange {};

  struct SharedStorage : std::conditional_t<(kWarpsN > 1), Exchange, NoExchange> {
    alignas(128) Element q_or_o[kTileM * (kHeadDim > kHeadDimV ? kHeadDim : kHeadDimV)];
    alignas(128) Element k[TileK::kSize];
    alignas(128) Element v[TileV::kSize];
  };
  static_assert(sizeof(SharedStorage) == smem_bytes(kVariant), "the planner and the kernel disagree on shared memory");
  static_assert(sizeof(SharedStorage) <= bytes_of(kVariant.smem), "the tile doesn't fit the GPUs that its row is for");

  template <int kCols>
  using Access = RowAccess<Element, kNumThreads, kCols>;

  // The (row, column) within the tile of each element that this lane holds of S and of O.
  static CUTE_DEVICE auto score_coords() { return Mma::template coords<kTileM, kTileN>(threadIdx.x); }
  static CUTE_DEVICE auto output_coords() { return Mma::template coords<kTileM, kHeadDimV>(threadIdx.x); }

  // Those of S for a step that masks, from a thread index that is read anew: otherwise nvcc 13.0 computes before the
  // main loop where each row's window begins and ends, and spills it (72 bytes, not 32, at head dim 64; 24, not 8, at
  // 128). Kernels for few rows have registers enough.
  static CUTE_DEVICE auto mask_coords() {
    if constexpr (kMask == Mask::kGeneral && !kFewRows) {
      return Mma::template coords<kTileM, kTileN>(thread_idx_anew());
    } else {
      return score_coords();
    }
  }
};

}  // namespace flash_attn::sm80

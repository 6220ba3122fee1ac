// Everything about an SM80 forward kernel that is known when it is compiled, derived once from its tile row.
#pragma once

#include <cutlass/bfloat16.h>
#include <cutlass/half.h>

#include <cute/algorithm/copy.hpp>
#include <cute/tensor.hpp>
#include <type_traits>

#include "variant/tiles.h"

namespace flash_attn::sm80 {

using namespace cute;

template <Variant kVariantValue>
struct ForwardTraits {
  static constexpr Variant kVariant = kVariantValue;
  static constexpr Tile kTile = tile_for(kVariant);
  static constexpr Mask kMask = kVariant.mask;
  static constexpr Score kScore = kVariant.score;
  static constexpr int kTileM = kTile.m;
  static constexpr int kTileN = kTile.n;
  static constexpr int kHeadDim = kVariant.head_dim.qk;
  static constexpr int kHeadDimV = kVariant.head_dim.v;
  static constexpr int kWarpsM = kTile.warps_m;
  static constexpr int kWarpsN = kTile.warps_n;
  static constexpr int kNumThreads = num_threads(kTile);

  using Element = std::conditional_t<kVariant.dtype == Dtype::kFp16, cutlass::half_t, cutlass::bfloat16_t>;

  // ---- matrix products: a warp owns 16 rows of every 16 * kWarpsM, and 16 columns of every 16 * kWarpsN
  using MmaAtom =
      std::conditional_t<kVariant.dtype == Dtype::kFp16, SM80_16x8x16_F32F16F16F32_TN, SM80_16x8x16_F32BF16BF16F32_TN>;
  using TiledMma = TiledMMA<MMA_Atom<MmaAtom>, Layout<Shape<Int<kWarpsM>, Int<kWarpsN>, _1>>,
                            decltype(make_tile(Int<16 * kWarpsM>{}, Int<16 * kWarpsN>{}, _16{}))>;
  static constexpr int kRowsPerLane = 2 * kTileM / (16 * kWarpsM);
  static_assert(kTileM % (16 * kWarpsM) == 0 && kTileN % (16 * kWarpsN) == 0);

  // ---- shared memory: swizzled so that both 16-byte stores of a row and ldmatrix's column of rows miss no bank
  static constexpr int kVectorElements = sizeof(uint128_t) / sizeof(Element);
  template <int kCols>
  using SmemAtom =
      std::conditional_t<kCols % 64 == 0,
                         decltype(composition(Swizzle<3, 3, 3>{}, Layout<Shape<_8, _64>, Stride<_64, _1>>{})),
                         decltype(composition(Swizzle<2, 3, 3>{}, Layout<Shape<_8, _32>, Stride<_32, _1>>{}))>;
  template <int kRows, int kCols>
  using SmemLayout = decltype(tile_to_shape(SmemAtom<kCols>{}, Shape<Int<kRows>, Int<kCols>>{}));

  using SmemLayoutQ = SmemLayout<kTileM, kHeadDim>;
  using SmemLayoutK = SmemLayout<kTileN, kHeadDim>;
  using SmemLayoutV = SmemLayout<kTileN, kHeadDimV>;
  using SmemLayoutO = SmemLayout<kTileM, kHeadDimV>;
  // V seen as (head_dim_v, keys), which is how the second product reads it.
  using SmemLayoutVt = decltype(composition(
      SmemLayoutV{}, make_layout(Shape<Int<kHeadDimV>, Int<kTileN>>{}, Stride<Int<kTileN>, _1>{})));

  using SmemLayoutP = SmemLayout<kTileM, kTileN>;

  // Between warps that share rows: P, which each reads whole, and the rows' maxima and sums.
  struct Exchange {
    alignas(128) Element p[kTileM * kTileN];
    float rows[kWarpsN * kTileM];
  };
  struct NoExchange {};

  struct SharedStorage : std::conditional_t<(kWarpsN > 1), Exchange, NoExchange> {
    alignas(128) Element q_or_o[kTileM * (kHeadDim > kHeadDimV ? kHeadDim : kHeadDimV)];
    alignas(128) Element k[cosize_v<SmemLayoutK>];
    alignas(128) Element v[cosize_v<SmemLayoutV>];
  };
  static_assert(sizeof(SharedStorage) == smem_bytes(kVariant), "the planner and the kernel disagree on shared memory");
  static_assert(sizeof(SharedStorage) <= bytes_of(kVariant.smem), "the tile doesn't fit the GPUs that its row is for");

  using SmemCopyAtom = Copy_Atom<SM75_U32x4_LDSM_N, Element>;
  using SmemCopyAtomTransposed = Copy_Atom<SM75_U16x8_LDSM_T, Element>;

  // ---- global memory: neighbouring threads take neighbouring 16 bytes of a row
  template <int kCols>
  static constexpr int kThreadsPerRow = (kCols % 64 == 0 ? 64 : 32) / kVectorElements;
  template <int kCols>
  using ThreadLayout = Layout<Shape<Int<kNumThreads / kThreadsPerRow<kCols>>, Int<kThreadsPerRow<kCols>>>,
                              Stride<Int<kThreadsPerRow<kCols>>, _1>>;
  template <int kCols>
  static constexpr bool kLoadsWholeTiles =
      kTileM % (kNumThreads / kThreadsPerRow<kCols>) == 0 && kTileN % (kNumThreads / kThreadsPerRow<kCols>) == 0;
  static_assert(kLoadsWholeTiles<kHeadDim> && kLoadsWholeTiles<kHeadDimV>, "a load would pass the end of its tile");
  template <int kCols>
  using TiledLoad = decltype(make_tiled_copy(Copy_Atom<SM80_CP_ASYNC_CACHEGLOBAL_ZFILL<uint128_t>, Element>{},
                                             ThreadLayout<kCols>{}, Layout<Shape<_1, Int<kVectorElements>>>{}));
  template <int kCols>
  using TiledStore = decltype(make_tiled_copy(Copy_Atom<AutoVectorizingCopyWithAssumedAlignment<128>, Element>{},
                                              ThreadLayout<kCols>{}, Layout<Shape<_1, Int<kVectorElements>>>{}));
};

}  // namespace flash_attn::sm80

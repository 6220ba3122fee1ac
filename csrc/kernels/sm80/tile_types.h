// The building blocks of every SM80 kernel's traits: matrix instructions, shared memory layouts, global memory
// accesses.
#pragma once

#include <cutlass/bfloat16.h>
#include <cutlass/half.h>

#include <cute/algorithm/copy.hpp>
#include <cute/tensor.hpp>
#include <type_traits>

#include "kernels/sm80/instructions.h"
#include "variant/tiles.h"

namespace flash_attn::sm80 {

using namespace cute;

template <Dtype kDtype>
using ElementOf = std::conditional_t<kDtype == Dtype::kFp16, cutlass::half_t, cutlass::bfloat16_t>;

// Warps as rows x columns of a product: each owns 16 rows of every 16 * kRows, and 16 columns of every 16 * kCols.
template <Dtype kDtype, int kRows, int kCols>
using WarpMma = TiledMMA<MMA_Atom<std::conditional_t<kDtype == Dtype::kFp16, MmaFp16, MmaBf16>>,
                         Layout<Shape<Int<kRows>, Int<kCols>, _1>>,
                         decltype(make_tile(Int<16 * kRows>{}, Int<16 * kCols>{}, _16{}))>;

// Swizzled so that both 16-byte stores of a row and ldmatrix's column of rows miss no bank.
template <int kCols>
using SmemAtom =
    std::conditional_t<kCols % 64 == 0,
                       decltype(composition(Swizzle<3, 3, 3>{}, Layout<Shape<_8, _64>, Stride<_64, _1>>{})),
                       decltype(composition(Swizzle<2, 3, 3>{}, Layout<Shape<_8, _32>, Stride<_32, _1>>{}))>;
template <int kRows, int kCols>
using SmemTile = decltype(tile_to_shape(SmemAtom<kCols>{}, Shape<Int<kRows>, Int<kCols>>{}));
// The same memory seen as (columns, rows).
template <int kRows, int kCols>
using TransposedSmemTile = decltype(composition(
    SmemTile<kRows, kCols>{}, make_layout(Shape<Int<kCols>, Int<kRows>>{}, Stride<Int<kRows>, _1>{})));

// Neighbouring threads take neighbouring 16 bytes of a row.
template <class Element, int kNumThreads, int kCols>
struct RowAccess {
  static constexpr int kThreadsPerRow = (kCols % 64 == 0 ? 64 : 32) / kVectorElements;
  static constexpr int kRowsPerPass = kNumThreads / kThreadsPerRow;
  static constexpr bool takes_whole(int tile_m, int tile_n) {
    return tile_m % kRowsPerPass == 0 && tile_n % kRowsPerPass == 0;
  }
  using ThreadLayout = Layout<Shape<Int<kRowsPerPass>, Int<kThreadsPerRow>>, Stride<Int<kThreadsPerRow>, _1>>;
  using ValueLayout = Layout<Shape<_1, Int<kVectorElements>>>;
  using TiledLoad = decltype(make_tiled_copy(Copy_Atom<AsyncCopy, Element>{}, ThreadLayout{}, ValueLayout{}));
  using TiledStore = decltype(make_tiled_copy(Copy_Atom<AutoVectorizingCopyWithAssumedAlignment<128>, Element>{},
                                              ThreadLayout{}, ValueLayout{}));
};

}  // namespace flash_attn::sm80

// How the warps of a thread block share a matrix product, and what each lane holds of its result. Written down, not
// derived by CuTe's tiled products and copies, whose layout algebra took most of a build's time.
#pragma once

#include <bit>
#include <type_traits>

#include "kernels/common/tensor.h"
#include "kernels/sm80/instructions.h"
#include "variant/tiles.h"

namespace flash_attn::sm80 {

using namespace cute;

// Rows and columns of one mma.m16n8k16, and its depth.
inline constexpr int kMmaRows = 16;
inline constexpr int kMmaCols = 8;
inline constexpr int kMmaDepth = 16;

// Warps as rows x columns of a product: each owns 16 rows of every 16 * kWarpsM, and 8 columns of every 8 * kWarpsN.
template <Dtype kDtype, int kWarpsMValue, int kWarpsNValue>
struct WarpMma {
  using Instruction = std::conditional_t<kDtype == Dtype::kFp16, MmaFp16, MmaBf16>;
  static constexpr int kWarpsM = kWarpsMValue;
  static constexpr int kWarpsN = kWarpsNValue;
  static constexpr int kRowStep = kMmaRows * kWarpsM;  // from one of a warp's instructions to its next
  static constexpr int kColStep = kMmaCols * kWarpsN;
  static_assert(std::has_single_bit(unsigned{kWarpsM}) && std::has_single_bit(unsigned{kWarpsN}),
                "TilePlace::at takes multiples of a power of two");

  static __device__ int warp_m(int thread_idx) { return thread_idx / kThreadsPerWarp % kWarpsM; }
  static __device__ int warp_n(int thread_idx) { return thread_idx / kThreadsPerWarp / kWarpsM; }

  // Where a thread's first element of an accumulator is: it has two neighbouring columns of this row and of the eighth
  // one after it.
  static __device__ int first_row(int thread_idx) {
    return warp_m(thread_idx) * kMmaRows + thread_idx % kThreadsPerWarp / 4;
  }
  static __device__ int first_col(int thread_idx) { return warp_n(thread_idx) * kMmaCols + thread_idx % 4 * 2; }

  // A thread's part of an accumulator, ((column pair, row pair), rows, columns).
  template <int kRows, int kCols>
  static __device__ auto make_accumulator() {
    static_assert(kRows % kRowStep == 0 && kCols % kColStep == 0, "the tile doesn't divide over the warps");
    return make_tensor<float>(Shape<Shape<_2, _2>, Int<kRows / kRowStep>, Int<kCols / kColStep>>{});
  }

  // The (row, column) within the tile of each element of it, in the view of as_rows_and_columns.
  template <int kRows, int kCols>
  static __device__ auto coords(int thread_idx) {
    using Rows = Layout<Shape<_2, Int<kRows / kRowStep>>, Stride<ScaledBasis<_8, 0>, ScaledBasis<Int<kRowStep>, 0>>>;
    using Cols = Layout<Shape<_2, Int<kCols / kColStep>>, Stride<ScaledBasis<_1, 1>, ScaledBasis<Int<kColStep>, 1>>>;
    return make_tensor(make_inttuple_iter(make_coord(first_row(thread_idx), first_col(thread_idx))),
                       make_layout(Rows{}, Cols{}));
  }
};

// Accumulator ((2, 2), MMA_M, MMA_N) -> (rows, columns).
template <class Layout>
CUTE_HOST_DEVICE constexpr auto as_rows_and_columns(Layout layout) {
  static_assert(decltype(rank(layout))::value == 3);
  const auto atom = get<0>(layout);  // (column pair, row pair)
  return make_layout(make_layout(get<1>(atom), get<1>(layout)), make_layout(get<0>(atom), get<2>(layout)));
}

}  // namespace flash_attn::sm80

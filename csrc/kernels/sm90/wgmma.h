// Asynchronous matrix products of a warpgroup, and the register layouts of their operands.
#pragma once

#include <cute/tensor.hpp>

#include "kernels/common/smem_tile.h"
#include "kernels/sm90/forward_traits.h"

namespace flash_attn::sm90 {

using namespace cute;

// So many of Q's descriptors stay in uniform registers over the loop. More would crowd out what else belongs there, the
// stages' indices first: it would take the lanes' registers, which then spill, and a move (R2UR) before each
// product.
inline constexpr int kMaxLastingDescriptors = 8;

// Starts acc = A B, or acc += A B, over kNumSteps of the steps from `first_step` on; B is in shared memory, A there or
// in registers. Until wait_for_gemms() the registers belong to the tensor cores.
template <int kNumSteps, class TiledMma, class FragA, class FragB, class Acc>
CUTE_DEVICE void start_gemm_steps(TiledMma mma, FragA& a, const FragB& b, Acc& acc, int first_step,
                                  GMMA::ScaleOut accumulate) {
  constexpr bool kRegisterA = !is_base_of<GMMA::DescriptorIterator, typename TiledMma::FrgTypeA>::value;
  if constexpr (kRegisterA) {
    fence_fragment(a);
  } else if constexpr (kNumSteps > kMaxLastingDescriptors) {
    hide_origin(a);
  }
  fence_fragment(acc);
  fence_products();
  mma.accumulate_ = accumulate;
  CUTE_UNROLL
  for (int k = 0; k < kNumSteps; ++k) {
    start_product(mma, a(_, _, first_step + k), b(_, _, first_step + k), acc);
    mma.accumulate_ = GMMA::ScaleOut::One;
  }
  commit_products();
}

template <class TiledMma, class FragA, class FragB, class Acc>
CUTE_DEVICE void start_gemm(const TiledMma& mma, FragA& a, const FragB& b, Acc& acc, GMMA::ScaleOut accumulate) {
  start_gemm_steps<decltype(size<2>(a))::value>(mma, a, b, acc, 0, accumulate);
}

// Waits until all products but the last kNumPending started are done, `acc` being the result of one of those.
template <int kNumPending, class Acc>
CUTE_DEVICE void wait_for_gemms(Acc& acc) {
  wait_for_products<kNumPending>();
  fence_fragment(acc);
}

// ---- accumulators: of a warp's 16 rows and of every eight columns a thread has two neighbouring columns of one row
// and of the eighth one after it

inline constexpr int kRowsPerWarp = 16;

// An accumulator of kCols columns: ((column pair, row pair, N / 8), 1, 1).
template <int kCols>
CUTE_DEVICE auto make_accumulator() {
  static_assert(kCols % 8 == 0);
  return make_tensor<float>(Shape<Shape<_2, _2, Int<kCols / 8>>, _1, _1>{});
}

// Accumulator ((2, 2, N / 8), 1, 1) -> (rows, columns).
template <class Layout>
CUTE_HOST_DEVICE constexpr auto as_rows_and_columns(Layout layout) {
  static_assert(decltype(rank<0>(layout))::value == 3);
  static_assert(decltype(size<1>(layout))::value == 1 && decltype(size<2>(layout))::value == 1);
  return make_layout(get<0, 1>(layout), make_layout(get<0, 0>(layout), get<0, 2>(layout)));
}

// A warp's first row among those of a tile, whose 64 rows from `first_row` on are the warpgroup's.
CUTE_DEVICE int first_row_of_warp(int first_row) {
  return first_row + threadIdx.x % kThreadsPerWarpgroup / kThreadsPerWarp * kRowsPerWarp;
}

// The (row, column) within the tile of each element that this thread holds, in the view of as_rows_and_columns.
template <int kCols>
CUTE_DEVICE auto accumulator_coords(int first_row) {
  using Rows = Layout<_2, ScaledBasis<_8, 0>>;
  using Cols = Layout<Shape<_2, Int<kCols / 8>>, Stride<ScaledBasis<_1, 1>, ScaledBasis<_8, 1>>>;
  const int lane = threadIdx.x % kThreadsPerWarp;
  return make_tensor(make_inttuple_iter(make_coord(first_row_of_warp(first_row) + lane / 4, lane % 4 * 2)),
                     make_layout(Rows{}, Cols{}));
}

// Stores a rounded accumulator as rows of a tile in shared memory, 16 columns of a warp's rows at a time: each lane has
// the address of eight columns of one row.
template <int kTileRows, int kCols, class Element, class Rounded>
CUTE_DEVICE void store_accumulator(Element* tile, int first_row, const Rounded& rounded) {
  static_assert(kCols % 16 == 0);
  const int lane = threadIdx.x % kThreadsPerWarp;
  const TilePlace<Element, SmemTile<kTileRows, kCols>> place(tile, first_row_of_warp(first_row) + lane % kRowsPerWarp,
                                                             lane / kRowsPerWarp * 8);
  const Tensor pairs = recast<const uint32_t>(rounded);  // two rows of every eight columns
  CUTE_UNROLL
  for (int n = 0; n < kCols / 16; ++n) {
    store_matrices(pairs(4 * n), pairs(4 * n + 1), pairs(4 * n + 2), pairs(4 * n + 3), place.at(0, 16 * n));
  }
}

// A warpgroup's 64 rows of a tile in shared memory as an A operand in registers: ((2, 2, 2), 1, columns / 16), the two
// rows of every eight columns.
template <int kTileRows, int kCols, class Element>
CUTE_DEVICE auto load_a_operand(Element* tile, int first_row) {
  Tensor operand = make_tensor<Element>(Shape<Shape<_2, _2, _2>, _1, Int<kCols / 16>>{});
  Tensor pairs = recast<uint32_t>(operand);
  const int lane = threadIdx.x % kThreadsPerWarp;
  const TilePlace<Element, SmemTile<kTileRows, kCols>> place(tile, first_row_of_warp(first_row) + lane % kRowsPerWarp,
                                                             lane / kRowsPerWarp * 8);
  CUTE_UNROLL
  for (int k = 0; k < kCols / 16; ++k) {
    load_matrices(pairs(4 * k), pairs(4 * k + 1), pairs(4 * k + 2), pairs(4 * k + 3), place.at(0, 16 * k));
  }
  return operand;
}

// Accumulator ((2, 2, N / 8), 1, 1) -> A operand ((2, 2, 2), 1, N / 16): two blocks of eight columns side by side are
// what a lane owns of 16 columns of A.
template <class Layout>
CUTE_HOST_DEVICE constexpr auto as_a_operand(Layout layout) {
  static_assert(decltype(rank<0>(layout))::value == 3 && decltype(size<2>(layout))::value == 1);
  const auto pairs = logical_divide(get<0, 2>(layout), Int<2>{});  // (2, N / 16)
  return make_layout(make_layout(get<0, 0>(layout), get<0, 1>(layout), get<0>(pairs)), get<1>(layout), get<1>(pairs));
}

}  // namespace flash_attn::sm90

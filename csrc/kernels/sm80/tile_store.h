// Stores an accumulator as rows of a tensor, through shared memory so that they leave in 16-byte pieces.
#pragma once

#include "kernels/common/convert.h"
#include "kernels/common/params.h"
#include "kernels/common/row_address.h"
#include "kernels/common/tensor.h"
#include "kernels/sm80/row_access.h"
#include "kernels/sm80/tile_loader.h"
#include "kernels/sm80/warp_mma.h"

namespace flash_attn::sm80 {

using namespace cute;

// Rows [begin, begin + the tile's) of a batch entry that has `count` of them.
struct RowBlock {
  int batch_idx;
  int64_t row_begin;  // of the entry
  int begin;
  int count;
};

// Columns [begin, begin + the tile's) of a head that has `count` of them.
struct ColumnBlock {
  int begin;
  int count;
};

// Rounds this lane's part of an accumulator into a tile in shared memory.
template <class Mma, int kRows, int kCols, class Element, class Acc>
__device__ void round_to_smem(Element* smem, const Acc& acc) {
  const TilePlace<Element, SmemTile<kRows, kCols>> place(smem, Mma::first_row(threadIdx.x),
                                                         Mma::first_col(threadIdx.x));
  const Tensor rounded = convert_to<Element>(acc);
  const Tensor pairs = recast<const uint32_t>(rounded);  // (row pair, rows, columns)
  CUTE_UNROLL
  for (int n = 0; n < size<2>(pairs); ++n) {
    CUTE_UNROLL
    for (int m = 0; m < size<1>(pairs); ++m) {
      CUTE_UNROLL
      for (int row_half = 0; row_half < 2; ++row_half) {
        Element* target = place.at(m * Mma::kRowStep + row_half * 8, n * Mma::kColStep);
        *reinterpret_cast<uint32_t*>(target) = pairs(row_half, m, n);
      }
    }
  }
}

// Stores this thread's parts of one row, from its first column of it on.
template <class Access, class Element, class Place>
CUTE_DEVICE void store_parts(Element* target, const Place& source, int pass, int num_cols) {
  CUTE_UNROLL
  for (int part = 0; part < Access::kNumParts; ++part) {
    if (Access::col_of_part(part) >= num_cols) continue;
    as_vector(target + part * Access::kPartCols) =
        as_vector(source.at(pass * Access::kRowsPerPass, part * Access::kPartCols));
  }
}

// Rounds and stores. `smem` holds a tile and may be in use by others until a barrier before the call.
template <class Traits, class Mma, int kRows, int kCols, class Acc>
__device__ void store_tile(const Operand& target, const RowBlock& rows, int head_idx, const ColumnBlock& columns,
                           typename Traits::Element* smem, const Acc& acc) {
  using Element = typename Traits::Element;
  using Access = typename Traits::template Access<kCols>;
  round_to_smem<Mma, kRows, kCols>(smem, acc);
  __syncthreads();

  const auto staged = Access::template place_in<kRows>(smem);
  Element* head = row_of<Element>(target, rows.batch_idx, rows.row_begin, head_idx) + columns.begin;
  CUTE_UNROLL
  for (int pass = 0; pass < Access::template num_passes<kRows>(); ++pass) {
    const int row_idx = rows.begin + Access::row_of_pass(pass);
    if (row_idx >= rows.count) continue;
    Element* row = head + row_idx * target.row_stride + Access::col_of_part(0);
    store_parts<Access>(row, staged, pass, columns.count - columns.begin);
  }
}

}  // namespace flash_attn::sm80

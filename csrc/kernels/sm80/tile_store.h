// Stores an accumulator as rows of a tensor, through shared memory so that they leave in 16-byte pieces.
#pragma once

#include <cute/tensor.hpp>

#include "kernels/common/fragment_layout.h"
#include "kernels/common/params.h"
#include "kernels/sm80/tile_loader.h"
#include "kernels/sm80/tile_types.h"

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

// Rounds this lane's part of an accumulator into a tile in shared memory, which it returns.
template <class Mma, int kRows, int kCols, class Element, class Acc>
__device__ auto round_to_smem(Element* smem, const Acc& acc) {
  Tensor tile = make_tensor(make_smem_ptr(smem), SmemTile<kRows, kCols>{});
  const auto to_smem = make_tiled_copy_C(Copy_Atom<AutoVectorizingCopyWithAssumedAlignment<32>, Element>{}, Mma{});
  const auto thread_to_smem = to_smem.get_slice(threadIdx.x);
  const Tensor rounded = convert_to<Element>(acc);
  copy(to_smem, thread_to_smem.retile_S(rounded), thread_to_smem.partition_D(tile));
  return tile;
}

// Rounds and stores. `smem` holds a tile and may be in use by others until a barrier before the call.
template <class Traits, class Mma, int kRows, int kCols, class Acc>
__device__ void store_tile(const Operand& target, const RowBlock& rows, int head_idx, const ColumnBlock& columns,
                           typename Traits::Element* smem, const Acc& acc) {
  using Element = typename Traits::Element;
  using TiledStore = typename Traits::template Access<kCols>::TiledStore;
  const Tensor staged = round_to_smem<Mma, kRows, kCols>(smem, acc);
  __syncthreads();

  const auto thread_store = TiledStore{}.get_slice(threadIdx.x);
  Element* head = head_of<Element>(target, rows.batch_idx, rows.row_begin, head_idx) + columns.begin;
  const Tensor source = thread_store.partition_S(staged);  // (CPY, CPY_M, CPY_K)
  Tensor gmem = thread_store.partition_D(gmem_tile<kRows, kCols>(head, rows.begin, target.row_stride));
  const Tensor coords = thread_store.partition_D(make_identity_tensor(Shape<Int<kRows>, Int<kCols>>{}));
  CUTE_UNROLL
  for (int m = 0; m < size<1>(source); ++m) {
    if (rows.begin + static_cast<int>(get<0>(coords(0, m, 0))) >= rows.count) continue;
    CUTE_UNROLL
    for (int k = 0; k < size<2>(source); ++k) {
      if (columns.begin + static_cast<int>(get<1>(coords(0, m, k))) < columns.count) {
        copy(TiledStore{}, source(_, m, k), gmem(_, m, k));
      }
    }
  }
}

}  // namespace flash_attn::sm80

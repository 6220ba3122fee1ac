// Boxes of rows as tensor_map.h's descriptors address them.
#pragma once

#include "kernels/common/params.h"
#include "kernels/sm90/instructions.h"

namespace flash_attn::sm90 {

using namespace cute;

// The rows of one head of one batch entry, of which a box may hold the last ones only.
template <int kBoxRows, int kBoxCols>
class RowBox {
 public:
  // Rows [row_begin, row_begin + num_rows) of the tensor, of which no more than kBoxRows are meant.
  __device__ RowBox(const Operand& operand, int batch_idx, int head_idx, int64_t row_begin, int num_rows)
      : row_(kBoxRows - min(num_rows, kBoxRows)),
        row_end_(static_cast<int>(row_begin) + min(num_rows, kBoxRows)),
        // Broadcast dimensions are one element long to the descriptor, as is the batch of a packed tensor.
        head_idx_(operand.head_stride == 0 ? 0 : head_idx),
        batch_idx_(operand.batch_stride == 0 ? 0 : batch_idx) {}

  // Starts the copy of kNumCols columns from `first_col` on to their place in the tile at `smem`, which has the boxes
  // one after the other; `barrier` counts the bytes.
  template <int kNumCols, class Element>
  __device__ void load(const CUtensorMap& map, CacheHint hint, Mbarrier& barrier, Element* smem,
                       int first_col = 0) const {
    CUTE_UNROLL
    for (int i = 0; i < kNumCols; i += kBoxCols) {
      const int col = first_col + i;
      load_box(map, hint, barrier, smem + col * kBoxRows, {col, row_, row_end_, head_idx_, batch_idx_});
    }
  }

  // Starts the copy of kNumCols columns to those from `first_col` on; `smem` has the boxes `box_stride` elements apart.
  template <int kNumCols, class Element>
  __device__ void store(const CUtensorMap& map, const Element* smem, int box_stride, int first_col) const {
    CUTE_UNROLL
    for (int i = 0; i < kNumCols; i += kBoxCols) {
      store_box(map, smem + i / kBoxCols * box_stride, {first_col + i, row_, row_end_, head_idx_, batch_idx_});
    }
  }

 private:
  int row_;
  int row_end_;
  int head_idx_;
  int batch_idx_;
};

}  // namespace flash_attn::sm90

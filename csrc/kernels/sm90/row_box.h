// Boxes of rows as tensor_map.h's descriptors address them.
#pragma once

#include "kernels/common/params.h"
#include "kernels/sm90/instructions.h"
#include "kernels/sm90/tile_order.h"

namespace flash_attn::sm90 {

using namespace cute;

// The rows of one head of one batch entry, of which a box may hold the last ones only.
template <int kBoxRows, int kBoxCols>
class RowBox {
 public:
  // Rows [row_begin, row_begin + num_rows) of the tensor, of which no more than `box_rows` are meant.
  __device__ RowBox(const Operand& operand, int batch_idx, int head_idx, int64_t row_begin, int num_rows,
                    int box_rows = kBoxRows)
      : row_(box_rows - min(num_rows, box_rows)),
        row_end_(static_cast<int>(row_begin) + min(num_rows, box_rows)),
        // Broadcast dimensions are one element long to the descriptor, as is the batch of a packed tensor.
        head_idx_(operand.head_stride == 0 ? 0 : head_idx),
        batch_idx_(operand.batch_stride == 0 ? 0 : batch_idx) {}

  // The packed rows of a tile from `first_row` of it on: a box has the heads of a query side by side, of which there
  // are a power of two, and so a whole number of queries.
  static __device__ RowBox of_packed_rows(const Operand& operand, const PackedTile& tile, int first_row) {
    const FastDivisor& heads = tile.rows.num_heads;
    const int first_query = heads.divide(tile.m_begin + first_row);
    return RowBox(operand, tile.seq.batch_idx, tile.rows.first_head, tile.seq.row_begin_q + first_query,
                  tile.seq.rows_q - first_query, heads.divide(kBoxRows));
  }

  // Starts the copy of kNumCols columns from `first_col` on to their place in the tile at `smem`, which has the boxes
  // one after the other; `barrier` counts the bytes.
  template <int kNumCols, class Element>
  __device__ void load(const CUtensorMap& map, CacheHint hint, Mbarrier& barrier, Element* smem,
                       int first_col = 0) const {
    CUTE_UNROLL
    for (int i = 0; i < kNumCols; i += kBoxCols) {
      const int col = first_col + i;
      load_box(map, hint, barrier, smem + col * kBoxRows, {col, head_idx_, row_, row_end_, batch_idx_});
    }
  }

  // The same to all blocks of a cluster, each of which starts the copies of some of the boxes: they need the same.
  template <int kNumCols, int kClusterBlocks, class Element>
  __device__ void load_for_cluster(const CUtensorMap& map, CacheHint hint, Mbarrier& barrier, Element* smem,
                                   int first_col) const {
    if constexpr (kClusterBlocks == 1) {
      load<kNumCols>(map, hint, barrier, smem, first_col);
    } else {
      constexpr unsigned kAllBlocks = (1u << kClusterBlocks) - 1;
      CUTE_UNROLL
      for (int i = 0; i < kNumCols; i += kBoxCols * kClusterBlocks) {
        const int col = first_col + i + block_of_cluster() * kBoxCols;
        load_box_to_blocks(map, hint, barrier, smem + col * kBoxRows, kAllBlocks,
                           {col, head_idx_, row_, row_end_, batch_idx_});
      }
    }
  }

  // Starts the copy of kNumCols columns to those from `first_col` on; `smem` has the boxes `box_stride` elements apart.
  template <int kNumCols, class Element>
  __device__ void store(const CUtensorMap& map, const Element* smem, int box_stride, int first_col) const {
    CUTE_UNROLL
    for (int i = 0; i < kNumCols; i += kBoxCols) {
      store_box(map, smem + i / kBoxCols * box_stride, {first_col + i, head_idx_, row_, row_end_, batch_idx_});
    }
  }

 private:
  int row_;
  int row_end_;
  int head_idx_;
  int batch_idx_;
};

}  // namespace flash_attn::sm90

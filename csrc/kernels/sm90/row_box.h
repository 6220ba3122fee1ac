// Boxes of rows as tensor_map.h's descriptors address them.
#pragma once

#include "kernels/common/row_map.h"
#include "kernels/sm90/cluster.h"
#include "kernels/sm90/instructions.h"
#include "kernels/sm90/tensor_map.h"

namespace flash_attn::sm90 {

using namespace cute;

// The rows of one head of one batch entry, of which a box may hold the last ones only.
template <int kBoxRows, int kBoxCols>
class RowBox {
 public:
  // The first of rows [row_begin, row_begin + num_rows) of an entry, as many as a box has; of a packed tensor all
  // entries are one.
  __device__ RowBox(const TensorMap& map, int batch_idx, int head_idx, int64_t row_begin, int num_rows)
      : map_(map),
        head_(map.head_step * head_idx + map.entry_step * batch_idx),
        row_(kRowBound - min(num_rows, kBoxRows)),
        row_end_(static_cast<int>(row_begin) + min(num_rows, kBoxRows)) {}

  // All rows from `row_begin` on that a box has, the first `num_zeros` of them zeros.
  static __device__ RowBox with_zeros(const TensorMap& map, int batch_idx, int head_idx, int row_begin, int num_zeros) {
    RowBox box(map, batch_idx, head_idx, row_begin, 0);
    box.row_ = -num_zeros;
    box.row_end_ = row_begin + num_zeros;
    box.wraps_ = 0;
    return box;
  }

  // The packed rows of a tile from `first_row` of it on: a box has the heads of a query side by side, of which there
  // are a power of two, and so a whole number of queries.
  static __device__ RowBox of_packed_rows(const TensorMap& map, const PackedTile& tile, int first_row) {
    const int first_query = tile.rows.num_heads.divide(tile.m_begin + first_row);
    return RowBox(map, tile.seq.batch_idx, tile.rows.first_head, tile.seq.row_begin_q + first_query,
                  tile.seq.rows_q - first_query);
  }

  // Starts the copy of kNumCols columns from `first_col` on to their place in the tile at `smem`, which has the boxes
  // one after the other; `barrier` counts the bytes. The blocks of a cluster need the same: each starts the copies of
  // some of the boxes, to all.
  template <int kNumCols, class Cluster = SingleBlock, class Element>
  __device__ void load(CacheHint hint, Mbarrier& barrier, Element* smem, int first_col = 0) const {
    CUTE_UNROLL
    for (int i = 0; i < kNumCols; i += kBoxCols * Cluster::kNumBlocks) {
      const int col = first_col + i + Cluster::block_idx() * kBoxCols;
      Cluster::load(map_.descriptor, hint, barrier, smem + col * kBoxRows, at(col));
    }
  }

  // Starts the copy of kNumCols columns to those from `first_col` on; `smem` has the boxes `box_stride` elements apart.
  template <int kNumCols, class Element>
  __device__ void store(const Element* smem, int box_stride, int first_col) const {
    CUTE_UNROLL
    for (int i = 0; i < kNumCols; i += kBoxCols) {
      store_box(map_.descriptor, smem + i / kBoxCols * box_stride, at(first_col + i));
    }
  }

 private:
  __device__ BoxCoord at(int col) const { return {col, head_, row_, row_end_, wraps_}; }

  const TensorMap& map_;
  int head_;
  int row_;
  int row_end_;
  int wraps_ = kRowBound;
};

}  // namespace flash_attn::sm90

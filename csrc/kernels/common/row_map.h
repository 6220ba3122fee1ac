// Which query and head each row of a tile is. Rows count from the first of the batch entry.
#pragma once

#include "kernels/common/fast_divisor.h"
#include "kernels/common/kv_range.h"
#include "variant/rounding.h"

namespace flash_attn {

// The queries of one head.
struct HeadRows {
  int head_idx;

  __device__ int query(int row) const { return row; }
  __device__ int head(int) const { return head_idx; }
};

// The queries of neighbouring heads, a query's heads side by side, so that the rows of a tile see nearly the same keys.
struct PackedRows {
  int first_head;
  FastDivisor num_heads;

  __device__ int query(int row) const { return num_heads.divide(row); }
  __device__ int head(int row) const { return first_head + row - query(row) * num_heads.divisor(); }
};

// Tiles of the packed rows of an entry with so many rows of Q.
__device__ inline int64_t num_row_tiles(int rows_q, int packed_heads, int tile_m) {
  return ceil_div(static_cast<int64_t>(rows_q) * packed_heads, tile_m);
}

// A tile of packed rows of one batch entry.
struct PackedTile {
  SeqInfo seq;
  PackedRows rows;
  int m_begin;  // first packed row within the entry

  __device__ int num_rows() const { return seq.rows_q * rows.num_heads.divisor(); }
  __device__ int num_used_rows() const { return seq.seqlen_q * rows.num_heads.divisor(); }
  // A slot may lie past its entry's rows, or, where the first offset isn't 0, before them.
  __device__ bool has_rows() const { return m_begin >= 0 && m_begin < num_rows(); }
  __device__ bool has_used_rows() const { return m_begin < num_used_rows(); }
};

// The keys that packed row i may see, [begin, end).
template <Mask kMask>
struct PackedKeys {
  static constexpr bool kHasBegin = VisibleKeys<kMask>::kHasBegin;

  VisibleKeys<kMask> keys;
  PackedRows rows;

  __device__ int begin(int row) const { return keys.begin(rows.query(row)); }
  __device__ int end(int row) const { return keys.end(rows.query(row)); }
};

}  // namespace flash_attn

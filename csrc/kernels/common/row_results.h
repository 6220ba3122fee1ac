// The epilogue's part that all forward kernels share: rows that are not in use, sinks and LSE.
#pragma once

#include "kernels/common/params.h"
#include "kernels/common/row_map.h"
#include "kernels/common/seq_info.h"
#include "kernels/common/tensor.h"

namespace flash_attn {

using namespace cute;

// Rows past the length in use, but within the tensor: O = 0, LSE = -inf, with or without a sink. `coords` holds the
// (row, column) within the tile of each element of `output`, both in (rows, columns) view.
template <int kTileM, class Coords, class Output, class LseRows>
__device__ void clear_unused_rows(int m_begin, int num_used_rows, const Coords& coords, Output& output, LseRows& lse) {
  if (m_begin + kTileM <= num_used_rows) return;
  CUTE_UNROLL
  for (int row = 0; row < size<0>(output); ++row) {
    if (m_begin + static_cast<int>(get<0>(coords(row, 0))) < num_used_rows) continue;
    lse(row) = -INFINITY;
    CUTE_UNROLL
    for (int col = 0; col < size<1>(output); ++col) output(row, col) = 0.f;
  }
}

template <class Coords, class LseRows>
__device__ void store_lse(const ForwardParams& params, const TileCoord& tile, const Coords& coords,
                          const LseRows& lse) {
  const SeqInfo& seq = tile.seq;
  float* target = params.lse.ptr + seq.batch_idx * params.lse.batch_stride + seq.row_begin_q +
                  tile.head_idx * params.lse.head_stride + tile.m_begin;
  if (static_cast<int>(get<1>(coords(0, 0))) != 0) return;  // the first lane of four that share a row writes it
  CUTE_UNROLL
  for (int i = 0; i < size(lse); ++i) {
    const int row = get<0>(coords(i, 0));
    if (tile.m_begin + row < seq.rows_q) target[row] = lse(i);
  }
}

// The LSE of each packed row that the entry has goes where its query and head belong.
template <class Coords, class LseRows>
__device__ void store_packed_lse(const ForwardParams& params, const PackedTile& tile, const Coords& coords,
                                 const LseRows& lse) {
  if (static_cast<int>(get<1>(coords(0, 0))) != 0) return;
  float* entry = params.lse.ptr + tile.seq.batch_idx * params.lse.batch_stride + tile.seq.row_begin_q;
  CUTE_UNROLL
  for (int i = 0; i < size(lse); ++i) {
    const int row = tile.m_begin + static_cast<int>(get<0>(coords(i, 0)));
    if (row < tile.num_rows()) entry[tile.rows.head(row) * params.lse.head_stride + tile.rows.query(row)] = lse(i);
  }
}

// The sink of each packed row that a lane holds; null: none.
template <class Softmax, class Coords>
__device__ typename Softmax::RowTensor sinks_of_rows(const float* sinks_of_heads, const PackedTile& tile,
                                                     const Coords& coords) {
  typename Softmax::RowTensor sinks;
  CUTE_UNROLL
  for (int i = 0; i < size(sinks); ++i) {
    const int row = tile.m_begin + static_cast<int>(get<0>(coords(i, 0)));
    sinks(i) = sinks_of_heads == nullptr ? -INFINITY : sinks_of_heads[tile.rows.head(row)];
  }
  return sinks;
}

}  // namespace flash_attn

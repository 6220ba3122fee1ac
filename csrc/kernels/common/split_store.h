// Stores a part of a tile's keys in the workspace of SplitParams, from where merge_splits.cu fetches it.
#pragma once

#include "kernels/common/params.h"
#include "kernels/common/row_map.h"
#include "kernels/common/tensor.h"
#include "variant/varlen_tiles.h"

namespace flash_attn {

using namespace cute;

// The slots of an entry all of whose tiles have `num_splits` parts: for each part, all tiles of rows.
struct EntrySlots {
  int64_t first;
  int64_t row_tiles;

  // The slot of a part of the tile at packed row `m_begin`.
  template <int kTileM>
  __device__ int64_t slot_of(int m_begin, int part) const {
    return first + part * row_tiles + m_begin / kTileM;
  }
};

// A row of Q is `packed_heads` packed rows.
template <int kTileM>
__device__ EntrySlots slots_of_entry(const ForwardParams& params, const SeqInfo& seq, int packed_heads,
                                     int num_splits) {
  const int64_t row_tiles = num_row_tiles(seq.rows_q, packed_heads, kTileM);
  const int64_t first = params.seq.cu_seqlens_q == nullptr
                            ? seq.batch_idx * row_tiles
                            : first_varlen_slot(seq.row_begin_q * packed_heads, seq.batch_idx, kTileM);
  return {num_splits * first, row_tiles};
}

// Tells the kernel that merges them where an entry's parts are. One thread of the launch calls it for each entry that
// has some: one that works on the first head's first tile and part.
__device__ inline void note_parts(const ForwardParams& params, int entry, int64_t first_slot, int num_splits) {
  params.split.entries[entry] = {static_cast<int>(first_slot), num_splits};
}

// One part of the tile's first `num_rows` rows, to the workspace's tile `tile_idx`, in float32 and straight from the
// registers: a lane has pairs of columns, and four lanes write a sector. `coords` holds the (row, column) of each
// element of `output`, whose columns are those from `first_col` on.
template <int kTileM, class Coords, class Output, class LseRows>
__device__ void store_partial(const ForwardParams& params, int64_t tile_idx, int num_rows, const Coords& coords,
                              int first_col, const Output& output, const LseRows& lse) {
  const int64_t first_row = tile_idx * kTileM;
  const int head_dim_v = params.heads.head_dim_v;
  CUTE_UNROLL
  for (int i = 0; i < size<0>(output); ++i) {
    const int row = get<0>(coords(i, 0));
    if (row >= num_rows) continue;
    if (first_col + static_cast<int>(get<1>(coords(i, 0))) == 0) params.split.lse[first_row + row] = lse(i);
    float* target = params.split.o + (first_row + row) * head_dim_v;
    CUTE_UNROLL
    for (int j = 0; j < size<1>(output); j += 2) {
      const int column = first_col + static_cast<int>(get<1>(coords(i, j)));
      if (column < head_dim_v)
        *reinterpret_cast<float2*>(target + column) = make_float2(output(i, j), output(i, j + 1));
    }
  }
}

}  // namespace flash_attn

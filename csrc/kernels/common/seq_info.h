// Where a thread block's tile lies: its batch entry, head and query rows, for dense and variable-length batches.
#pragma once

#include "kernels/common/params.h"
#include "variant/varlen_tiles.h"

namespace flash_attn {

// Offsets and lengths of one batch entry, whatever its layout.
struct SeqInfo {
  int batch_idx;  // 0 where the tensors have no batch dimension
  int64_t row_begin_q;
  int64_t row_begin_k;
  int seqlen_q;
  int seqlen_k;

  // Column of the first row's diagonal: causal masks end in the bottom-right corner.
  __device__ int diagonal() const { return seqlen_k - seqlen_q; }
};

struct TileCoord {
  SeqInfo seq;
  int head_idx;
  int m_begin;      // first query row within the entry
  bool is_padding;  // rows that belong to no entry: O = 0, LSE = -inf

  // A slot may lie past its entry's rows, or, where the first offset isn't 0, before them.
  __device__ bool has_rows() const { return m_begin >= 0 && m_begin < seq.seqlen_q; }
};

namespace detail {

__device__ inline int clamp_to(int value, int low, int high) { return min(max(value, low), high); }

// cu_seqlens[idx], held within the tensor: whatever the metadata says, no address leaves it.
__device__ inline int row_at(const int* cu_seqlens, int idx, int num_rows) {
  return clamp_to(cu_seqlens[idx], 0, num_rows);
}

// Last entry whose first slot is at most `slot`; batch if the slot lies past all entries.
__device__ inline int entry_of_slot(const SeqParams& seq, int slot, int tile_m) {
  int low = 0;
  int high = seq.batch;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    const int row = row_at(seq.cu_seqlens_q, middle, seq.rows_q);
    if (first_varlen_slot(row, middle, tile_m) <= slot) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

__device__ inline TileCoord varlen_tile(const SeqParams& seq, int slot, int head_idx, int tile_m) {
  const int entry = entry_of_slot(seq, slot, tile_m);
  const int begin_q = row_at(seq.cu_seqlens_q, entry, seq.rows_q);
  const int m_begin = (slot - static_cast<int>(first_varlen_slot(begin_q, entry, tile_m))) * tile_m;
  if (entry == seq.batch) {
    return {{0, begin_q, 0, seq.rows_q - begin_q, 0}, head_idx, m_begin, true};
  }
  const int begin_k = row_at(seq.cu_seqlens_k, entry, seq.rows_k);
  const int end_q = row_at(seq.cu_seqlens_q, entry + 1, seq.rows_q);
  const int end_k = row_at(seq.cu_seqlens_k, entry + 1, seq.rows_k);
  return {{0, begin_q, begin_k, max(end_q - begin_q, 0), max(end_k - begin_k, 0)}, head_idx, m_begin, false};
}

}  // namespace detail

// Decodes a block index. Blocks run through a head's tiles from the last row up, so that under a causal mask the
// longest start first, then through heads, so that neighbours read the same K and V from L2.
template <int kTileM>
__device__ TileCoord locate_tile(const ForwardParams& params, int block_idx) {
  const int tile_idx = params.tiles_per_head - 1 - block_idx % params.tiles_per_head;
  const int run = block_idx / params.tiles_per_head;
  const int head_idx = run % params.heads.num_heads;
  if (params.seq.cu_seqlens_q != nullptr) {
    return detail::varlen_tile(params.seq, tile_idx, head_idx, kTileM);
  }
  const int batch_idx = run / params.heads.num_heads;
  return {{batch_idx, 0, 0, params.seq.rows_q, params.seq.rows_k}, head_idx, tile_idx * kTileM, false};
}

}  // namespace flash_attn

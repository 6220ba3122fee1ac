// Where a thread block's tile lies: its batch entry, head and query rows, for dense and variable-length batches.
#pragma once

#include "kernels/common/params.h"
#include "variant/varlen_tiles.h"

namespace flash_attn {

// Offsets and lengths of one batch entry, whatever its layout.
struct SeqInfo {
  int batch_idx;
  int64_t row_begin_q;  // 0 where the tensors have a batch dimension
  int64_t row_begin_k;
  int rows_q;    // rows of O and LSE that belong to the entry
  int seqlen_q;  // of which these are in use; the others get O = 0, LSE = -inf
  int seqlen_k;

  // Column of the first row's diagonal: causal masks end in the bottom-right corner.
  __device__ int diagonal() const { return seqlen_k - seqlen_q; }
};

struct TileCoord {
  SeqInfo seq;
  int head_idx;
  int m_begin;  // first query row within the entry

  // A slot may lie past its entry's rows, or, where the first offset isn't 0, before them.
  __device__ bool has_rows() const { return m_begin >= 0 && m_begin < seq.rows_q; }
  __device__ bool has_used_rows() const { return m_begin < seq.seqlen_q; }
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

// The entry's length in use, held within the rows that it has.
__device__ inline int used(const int* seqused, int entry, int num_rows) {
  return seqused == nullptr ? num_rows : clamp_to(seqused[entry], 0, num_rows);
}

__device__ inline TileCoord varlen_tile(const SeqParams& seq, int slot, int head_idx, int tile_m) {
  const int entry = entry_of_slot(seq, slot, tile_m);
  const int begin_q = row_at(seq.cu_seqlens_q, entry, seq.rows_q);
  const int m_begin = (slot - static_cast<int>(first_varlen_slot(begin_q, entry, tile_m))) * tile_m;
  if (entry == seq.batch) {  // rows past the last entry belong to none
    return {{entry, begin_q, 0, seq.rows_q - begin_q, 0, 0}, head_idx, m_begin};
  }
  const int rows_q = max(row_at(seq.cu_seqlens_q, entry + 1, seq.rows_q) - begin_q, 0);
  int begin_k = 0;
  int rows_k = seq.rows_k;
  if (seq.cu_seqlens_k != nullptr) {
    begin_k = row_at(seq.cu_seqlens_k, entry, seq.rows_k);
    rows_k = max(row_at(seq.cu_seqlens_k, entry + 1, seq.rows_k) - begin_k, 0);
  }
  return {{entry, begin_q, begin_k, rows_q, used(seq.seqused_q, entry, rows_q), used(seq.seqused_k, entry, rows_k)},
          head_idx,
          m_begin};
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
  const SeqParams& seq = params.seq;
  return {{batch_idx, 0, 0, seq.rows_q, detail::used(seq.seqused_q, batch_idx, seq.rows_q),
           detail::used(seq.seqused_k, batch_idx, seq.rows_k)},
          head_idx,
          tile_idx * kTileM};
}

}  // namespace flash_attn

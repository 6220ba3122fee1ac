// Where a thread block's tile lies: its batch entry, head and query rows, for dense and variable-length batches.
#pragma once

#include "kernels/common/bisection.h"
#include "kernels/common/params.h"
#include "variant/varlen_tiles.h"

namespace flash_attn {

// Offsets and lengths of one batch entry, whatever its layout.
struct SeqInfo {
  int batch_idx;
  int kv_batch_idx;     // row of K and V, or of the page table
  int64_t row_begin_q;  // 0 where the tensors have a batch dimension
  int64_t row_begin_k;  // of the first key: past the left padding
  int rows_q;           // rows of Q, O and LSE that belong to the entry
  int rows_k;           // rows of K and V that do
  int seqlen_q;         // of which these are in use; the others get O = 0, LSE = -inf
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

__device__ inline int clamp_to(int value, int low, int high) { return min(max(value, low), high); }

// cu_seqlens[idx], clamped to the tensor: whatever the metadata says, no address leaves it.
__device__ inline int row_at(const int* cu_seqlens, int idx, int num_rows) {
  return clamp_to(cu_seqlens[idx], 0, num_rows);
}

// Last entry whose first slot is at most `slot`; batch if the slot lies past all entries. A row of the tensor is
// `packed_heads` rows of tiles.
__device__ inline int entry_of_slot(const int* cu_seqlens, int batch, int num_rows, int slot, int tile_rows,
                                    int packed_heads = 1) {
  return last_entry(batch, [=](int entry) {
    const int64_t row = static_cast<int64_t>(row_at(cu_seqlens, entry, num_rows)) * packed_heads;
    return first_varlen_slot(row, entry, tile_rows) <= slot;
  });
}

// The entry's length in use, clamped to the rows that it has.
__device__ inline int length_in_use(const int* seqused, int entry, int num_rows) {
  return seqused == nullptr ? num_rows : clamp_to(seqused[entry], 0, num_rows);
}

struct RowSpan {
  int begin;
  int count;
};

// An entry's rows in a packed tensor; those past the last entry are entry `batch`, and belong to none.
__device__ inline RowSpan rows_of_entry(const int* cu_seqlens, int batch, int num_rows, int entry) {
  if (cu_seqlens == nullptr) return {0, num_rows};
  const int begin = row_at(cu_seqlens, entry, num_rows);
  const int end = entry == batch ? num_rows : row_at(cu_seqlens, entry + 1, num_rows);
  return {begin, max(end - begin, 0)};
}

// The rows of K that an entry has: of the whole tensor or, with pages, of those that its row of the table names.
__device__ inline RowSpan cache_of_entry(const SeqParams& seq, int entry) {
  if (!seq.has_pages) return rows_of_entry(seq.cu_seqlens_k, seq.batch, seq.rows_k, entry);
  if (seq.cu_seqlens_k == nullptr || seq.seqused_k != nullptr) return {0, seq.rows_k};
  const int64_t length = static_cast<int64_t>(seq.cu_seqlens_k[entry + 1]) - seq.cu_seqlens_k[entry];
  return {0, static_cast<int>(min(max(length, int64_t{0}), static_cast<int64_t>(seq.rows_k)))};
}

__device__ inline SeqInfo entry_info(const SeqParams& seq, int entry) {
  const RowSpan q = rows_of_entry(seq.cu_seqlens_q, seq.batch, seq.rows_q, entry);
  if (entry == seq.batch) {
    const RowSpan k = rows_of_entry(seq.cu_seqlens_k, seq.batch, seq.rows_k, entry);
    return {.batch_idx = entry,
            .kv_batch_idx = entry,
            .row_begin_q = q.begin,
            .row_begin_k = k.begin,
            .rows_q = q.count,
            .rows_k = k.count,
            .seqlen_q = 0,
            .seqlen_k = 0};
  }
  const RowSpan k = cache_of_entry(seq, entry);
  const int end_k = length_in_use(seq.seqused_k, entry, k.count);
  const int leftpad = seq.leftpad_k == nullptr ? 0 : clamp_to(seq.leftpad_k[entry], 0, end_k);
  const int kv_batch_idx =
      seq.cache_batch_idx == nullptr ? entry : clamp_to(seq.cache_batch_idx[entry], 0, seq.num_cache_rows - 1);
  return {.batch_idx = entry,
          .kv_batch_idx = kv_batch_idx,
          .row_begin_q = q.begin,
          .row_begin_k = k.begin + leftpad,
          .rows_q = q.count,
          .rows_k = k.count,
          .seqlen_q = length_in_use(seq.seqused_q, entry, q.count),
          .seqlen_k = end_k - leftpad};
}

struct TileSlot {
  int entry;
  int row_begin;  // within the entry
};

// The tile at `slot` of a packed tensor's run of tiles.
__device__ inline TileSlot varlen_tile(const int* cu_seqlens, int batch, int num_rows, int slot, int tile_rows,
                                       int packed_heads = 1) {
  const int entry = entry_of_slot(cu_seqlens, batch, num_rows, slot, tile_rows, packed_heads);
  const int64_t first_row = static_cast<int64_t>(row_at(cu_seqlens, entry, num_rows)) * packed_heads;
  const int64_t first_slot = first_varlen_slot(first_row, entry, tile_rows);
  return {entry, (slot - static_cast<int>(first_slot)) * tile_rows};
}

// Decodes the index of a tile of query rows. Indices run through a head's tiles from the last row up, so that under a
// causal mask the longest start first, then through heads, so that neighbours read the same K and V from L2.
template <int kTileM>
__device__ TileCoord locate_tile(const SeqParams& seq, int num_heads, int tiles_per_head, int idx) {
  const int tile_idx = tiles_per_head - 1 - idx % tiles_per_head;
  const int run = idx / tiles_per_head;
  if (seq.cu_seqlens_q == nullptr) {
    return {entry_info(seq, run / num_heads), run % num_heads, tile_idx * kTileM};
  }
  const TileSlot slot = varlen_tile(seq.cu_seqlens_q, seq.batch, seq.rows_q, tile_idx, kTileM);
  return {entry_info(seq, slot.entry), run % num_heads, slot.row_begin};
}

}  // namespace flash_attn

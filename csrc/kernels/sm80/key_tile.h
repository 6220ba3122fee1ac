// Where a backward thread block's tile of keys lies: its batch entry, head and rows of K and V.
#pragma once

#include "kernels/common/params.h"
#include "kernels/common/seq_info.h"

namespace flash_attn::sm80 {

struct KeyTileCoord {
  SeqInfo seq;
  int kv_head_idx;
  int n_begin;  // first key within the entry

  // A slot may lie past its entry's rows, or, where the first offset isn't 0, before them.
  __device__ bool has_rows() const { return n_begin >= 0 && n_begin < seq.rows_k; }
};

// Decodes the index of a tile of keys. Indices run up through a head's tiles, so that under a causal mask the longest
// start first, then through heads, so that neighbours read the same Q and dO from L2. Deterministic sums rely on it: a
// thread block waits only for those of smaller index.
template <int kTileN>
__device__ KeyTileCoord locate_key_tile(const SeqParams& seq, int num_kv_heads, int tiles_per_head, int idx) {
  const int tile_idx = idx % tiles_per_head;
  const int run = idx / tiles_per_head;
  if (seq.cu_seqlens_k == nullptr) {
    return {entry_info(seq, run / num_kv_heads), run % num_kv_heads, tile_idx * kTileN};
  }
  const TileSlot slot = varlen_tile(seq.cu_seqlens_k, seq.batch, seq.rows_k, tile_idx, kTileN);
  return {entry_info(seq, slot.entry), run % num_kv_heads, slot.row_begin};
}

}  // namespace flash_attn::sm80

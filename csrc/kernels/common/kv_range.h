// Which tiles of keys a block of query rows visits, which of them hold scores that must be masked, and the reverse.
#pragma once

#include "kernels/common/seq_info.h"
#include "variant/variant.h"

namespace flash_attn {

// The keys that query row i may see, [begin, end). The one place that knows the masks' geometry.
template <Mask kMask>
struct VisibleKeys {
  SeqInfo seq;
  WindowParams window;

  __device__ int begin(int row) const {
    if constexpr (kMask != Mask::kGeneral) return 0;
    return max(row + seq.diagonal() - window.left, 0);
  }
  __device__ int end(int row) const {
    if constexpr (kMask == Mask::kFull) return seq.seqlen_k;
    if constexpr (kMask == Mask::kCausal) return min(row + seq.diagonal() + 1, seq.seqlen_k);
    return min(row + seq.diagonal() + window.right + 1, seq.seqlen_k);
  }
};

// Tiles [begin, end) of keys, walked from the last to the first. Tiles [full_begin, full_end) are seen whole by every
// row.
struct KvRange {
  int begin;
  int end;
  int full_begin;
  int full_end;

  __device__ bool is_empty() const { return begin >= end; }
  __device__ bool needs_mask(int n_idx) const { return n_idx < full_begin || n_idx >= full_end; }
};

template <Mask kMask, int kTileM, int kTileN>
__device__ KvRange kv_range(const VisibleKeys<kMask>& keys, int m_begin) {
  const int m_last = min(m_begin + kTileM, keys.seq.seqlen_q) - 1;
  const auto tile_after = [](int key) { return (max(key, 0) + kTileN - 1) / kTileN; };
  return {keys.begin(m_begin) / kTileN, tile_after(keys.end(m_last)), tile_after(keys.begin(m_last)),
          max(keys.end(m_begin), 0) / kTileN};
}

// The query rows that see any of the keys [n_begin, n_end): [begin, end). A tile of rows meets one of keys exactly
// where kv_range says that the tile of keys is visited.
struct RowRange {
  int begin;
  int end;

  __device__ bool is_empty() const { return begin >= end; }
};

__device__ inline RowRange query_range(const VisibleKeys<Mask::kGeneral>& keys, int n_begin, int n_end) {
  if (n_begin >= keys.seq.seqlen_k) return {0, 0};
  const int diagonal = keys.seq.diagonal();
  return {max(n_begin - diagonal - keys.window.right, 0), min(n_end - diagonal + keys.window.left, keys.seq.seqlen_q)};
}

}  // namespace flash_attn

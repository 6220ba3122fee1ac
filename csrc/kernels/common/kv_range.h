// Which tiles of keys a block of query rows visits, which of them hold scores that must be masked, and the reverse.
#pragma once

#include "kernels/common/seq_info.h"
#include "variant/variant.h"

namespace flash_attn {

// The keys that query row i may see, [begin, end). The one place that knows the masks' geometry.
template <Mask kMask>
struct VisibleKeys {
  static constexpr bool kHasBegin = kMask == Mask::kGeneral;  // it need not be 0

  SeqInfo seq;
  WindowParams window;

  __device__ int begin(int row) const {
    if constexpr (!kHasBegin) return 0;
    return max(row + seq.diagonal() - window.left, 0);
  }
  __device__ int end(int row) const {
    if constexpr (kMask == Mask::kFull) return seq.seqlen_k;
    if constexpr (kMask == Mask::kCausal) return min(row + seq.diagonal() + 1, seq.seqlen_k);
    return min(row + seq.diagonal() + window.right + 1, seq.seqlen_k);
  }
};

struct KeySpan {
  int begin;
  int end;
};

// Tiles [begin, end) of keys, walked from the last to the first. Tiles [full_begin, full_end), of which there may be
// none (full_begin >= full_end), are seen whole by every row. No row sees what the tiles hold outside of `seen`: it may
// be anything, NaN too, which even a probability of 0 would spread.
struct KvRange {
  int begin;
  int end;
  int full_begin;
  int full_end;
  KeySpan seen;

  __device__ bool is_empty() const { return begin >= end; }
  __device__ bool needs_mask(int n_idx) const { return n_idx < full_begin || n_idx >= full_end; }

  // One of `count` parts of nearly equal size. What is seen whole, and at all, is as for the whole range.
  __device__ KvRange part(int idx, int count) const {
    const int64_t num_tiles = max(end - begin, 0);
    return {begin + static_cast<int>(num_tiles * idx / count), begin + static_cast<int>(num_tiles * (idx + 1) / count),
            full_begin, full_end, seen};
  }
};

// What the tile of rows that begins at m_begin visits, in an entry that has `num_rows`.
template <int kTileM, int kTileN, class Keys>
__device__ KvRange kv_range_of_rows(const Keys& keys, int m_begin, int num_rows) {
  const int m_last = min(m_begin + kTileM, num_rows) - 1;
  // Not by ceil_div, with which nvcc 13.0 puts the backward's loops in another order, up to 3 instructions longer.
  const auto tile_after = [](int key) { return (max(key, 0) + kTileN - 1) / kTileN; };
  const KeySpan seen{keys.begin(m_begin), keys.end(m_last)};
  return {seen.begin / kTileN, tile_after(seen.end), tile_after(keys.begin(m_last)), max(keys.end(m_begin), 0) / kTileN,
          seen};
}

template <Mask kMask, int kTileM, int kTileN>
__device__ KvRange kv_range(const VisibleKeys<kMask>& keys, int m_begin) {
  return kv_range_of_rows<kTileM, kTileN>(keys, m_begin, keys.seq.seqlen_q);
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

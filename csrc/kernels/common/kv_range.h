// Which tiles of keys a block of query rows visits, and which of them hold scores that must be masked.
#pragma once

#include "kernels/common/seq_info.h"
#include "variant/variant.h"

namespace flash_attn {

// Tiles [0, end) of keys, walked from the last to the first; from `first_masked` on, elements need a test.
struct KvRange {
  int end;
  int first_masked;

  __device__ bool is_empty() const { return end <= 0; }
  __device__ bool needs_mask(int n_idx) const { return n_idx >= first_masked; }
};

template <Mask kMask, int kTileM, int kTileN>
__device__ KvRange kv_range(const SeqInfo& seq, int m_begin) {
  int keys_seen_by_last_row = seq.seqlen_k;
  int keys_seen_by_all_rows = seq.seqlen_k;
  if constexpr (kMask == Mask::kCausal) {
    const int m_last = min(m_begin + kTileM, seq.seqlen_q) - 1;
    keys_seen_by_last_row = min(seq.seqlen_k, m_last + seq.diagonal() + 1);
    keys_seen_by_all_rows = min(seq.seqlen_k, m_begin + seq.diagonal() + 1);
  }
  return {(max(keys_seen_by_last_row, 0) + kTileN - 1) / kTileN, max(keys_seen_by_all_rows, 0) / kTileN};
}

}  // namespace flash_attn

// Writes new keys and values into a cache: rows of a dense batch, or pages.
#pragma once

#include <cuda_runtime.h>

#include "kernels/misc/rotation.h"
#include "kernels/misc/tokens.h"
#include "variant/variant.h"

namespace flash_attn {

// Where the entries lie in the cache. Token `position` of an entry is row position % page_size of page
// table[position / page_size], or without a table row `position` of the entry's batch row.
struct CachePlaces {
  const int* cache_seqlens;    // position of each entry's first new token
  const int* cache_batch_idx;  // row of the cache, or of the table, of each entry; null: its own
  const int* block_table;      // if has_pages; null also where it has no element
  bool has_pages;
  int64_t table_stride;
  int64_t num_table_rows;
  int64_t pages_per_row;
  int64_t num_pages;  // of the cache, or batch rows
  int64_t page_size;  // or rows of each
};

struct AppendParams {
  TokenLayout tokens;
  int* lengths;  // of the entries with their new tokens, for the attention, which would need a launch to compute them
  TokenOperand k;
  TokenOperand v;
  TokenOperand k_cache;
  TokenOperand v_cache;
  CachePlaces places;
  RotaryParams rotary;  // of k
  int num_heads;
  int head_dim;
  int head_dim_v;
};

// Writes the lengths of all entries, even where there is no token to write.
cudaError_t launch_append_kv(const AppendParams& params, Dtype dtype, TokenAccess access, cudaStream_t stream);

}  // namespace flash_attn

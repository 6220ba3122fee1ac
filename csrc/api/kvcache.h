// The ops that move tokens: append to a KV cache, and the rotary embedding of queries.
#pragma once

#include <optional>

#include "api/tensors.h"

namespace flash_attn {

// flash_attn._ops has the same texts for the CPU path; a test compares them.
#define FLASH_ATTN_APPEND_KV_SCHEMA                                                                       \
  "(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, Tensor? rotary_cos, Tensor? rotary_sin, " \
  "Tensor cache_seqlens, Tensor? cu_seqlens_k_new, Tensor? cache_batch_idx, Tensor? block_table, "        \
  "bool rotary_interleaved) -> Tensor"
#define FLASH_ATTN_ROTARY_SCHEMA \
  "(Tensor x, Tensor cos, Tensor sin, Tensor offsets, Tensor? cu_seqlens, bool interleaved, bool advance) -> Tensor"

// Writes token t of entry b at position cache_seqlens[b] + t, with k rotated at that position. Tokens whose position,
// cache row or page does not exist are dropped. Returns cache_seqlens plus the new tokens, dropped or not: (batch),
// int32.
Tensor append_kv(const Tensor& k_cache, const Tensor& v_cache, const Tensor& k, const Tensor& v,
                 const std::optional<Tensor>& rotary_cos, const std::optional<Tensor>& rotary_sin,
                 const Tensor& cache_seqlens, const std::optional<Tensor>& cu_seqlens_k_new,
                 const std::optional<Tensor>& cache_batch_idx, const std::optional<Tensor>& block_table,
                 bool rotary_interleaved);

// x with token i of entry b rotated at position offsets[b] + i, or offsets[b] if not `advance`.
Tensor rotary(const Tensor& x, const Tensor& cos, const Tensor& sin, const Tensor& offsets,
              const std::optional<Tensor>& cu_seqlens, bool interleaved, bool advance);

}  // namespace flash_attn

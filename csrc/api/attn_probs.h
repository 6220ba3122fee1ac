// The op behind S_dmask, which return_attn_probs gives with dropout.
#pragma once

#include "api/forward_args.h"

namespace flash_attn {

// flash_attn._ops has the same text for the CPU path; a test compares them.
#define FLASH_ATTN_ATTN_PROBS_SCHEMA                                                                     \
  "(Tensor q, Tensor k, Tensor lse, Tensor? alibi_slopes, Tensor? rng_state, Tensor? cu_seqlens_q, "     \
  "Tensor? cu_seqlens_k, Tensor? seqused_q, Tensor? seqused_k, Tensor? leftpad_k, Tensor? block_table, " \
  "Tensor? cache_batch_idx, SymInt max_seqlen_q, SymInt max_seqlen_k, float softmax_scale, "             \
  "SymInt window_left, SymInt window_right, float softcap, float dropout_p) -> Tensor"

struct AttnProbsArgs {
  Tensor lse;
  ForwardArgs forward;  // the call that gave `lse`, with k in the place of v
};

AttnProbsArgs take_attn_probs_args(StackReader& stack);

// (batch, head, row, column) in q's dtype: exp(score - lse), negative where dropped, 0 where there is no score.
Tensor attn_probs(const AttnProbsArgs& args);

}  // namespace flash_attn

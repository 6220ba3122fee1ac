// The arguments of the backward ops: one schema text and one reader that follows it.
#pragma once

#include "api/forward_args.h"

namespace flash_attn {

// flash_attn._ops has the same list for the CPU path; a test compares them.
#define FLASH_ATTN_BACKWARD_SCHEMA_ARGS                                                                      \
  "Tensor? dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? s_aux, "        \
  "Tensor? alibi_slopes, Tensor? rng_state, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seqused_q, " \
  "Tensor? seqused_k, SymInt max_seqlen_q, SymInt max_seqlen_k, float softmax_scale, SymInt window_left, "   \
  "SymInt window_right, float softcap, float dropout_p, bool deterministic, int arch"

struct BackwardArgs {
  std::optional<Tensor> dout;  // at least one of dout and dlse is given
  std::optional<Tensor> dlse;
  Tensor out;
  Tensor lse;
  ForwardArgs forward;  // the call whose gradient this is
};

// Where the gradients go, if the caller has a place for them.
struct Gradients {
  Tensor dq;
  Tensor dk;
  Tensor dv;
};

inline BackwardArgs take_backward_args(StackReader& stack) {
  using OptionalTensor = std::optional<Tensor>;
  OptionalTensor dout = stack.take<OptionalTensor>();
  OptionalTensor dlse = stack.take<OptionalTensor>();
  Tensor q = stack.take<Tensor>();
  Tensor k = stack.take<Tensor>();
  Tensor v = stack.take<Tensor>();
  Tensor out = stack.take<Tensor>();
  Tensor lse = stack.take<Tensor>();
  return {.dout = std::move(dout),
          .dlse = std::move(dlse),
          .out = std::move(out),
          .lse = std::move(lse),
          .forward = {.q = std::move(q),
                      .k = std::move(k),
                      .v = std::move(v),
                      .s_aux = stack.take<OptionalTensor>(),
                      .alibi_slopes = stack.take<OptionalTensor>(),
                      .rng_state = stack.take<OptionalTensor>(),
                      .cu_seqlens_q = stack.take<OptionalTensor>(),
                      .cu_seqlens_k = stack.take<OptionalTensor>(),
                      .seqused_q = stack.take<OptionalTensor>(),
                      .seqused_k = stack.take<OptionalTensor>(),
                      .max_seqlen_q = stack.take<int64_t>(),
                      .max_seqlen_k = stack.take<int64_t>(),
                      .softmax_scale = stack.take<double>(),
                      .window_left = stack.take<int64_t>(),
                      .window_right = stack.take<int64_t>(),
                      .softcap = stack.take<double>(),
                      .dropout_p = stack.take<double>(),
                      .num_splits = 1,
                      .deterministic = stack.take<bool>(),
                      .arch = stack.take<int64_t>()}};
}

}  // namespace flash_attn

// The arguments of the forward ops: one schema text and one reader that follows it, whatever the op does with them.
#pragma once

#include <torch/csrc/stable/library.h>

#include <optional>

#include "api/tensors.h"

namespace flash_attn {

// flash_attn._ops has the same list for the CPU path; a test compares them.
#define FLASH_ATTN_FORWARD_SCHEMA_ARGS                                                                    \
  "Tensor q, Tensor k, Tensor v, Tensor? s_aux, Tensor? alibi_slopes, Tensor? rng_state, "                \
  "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seqused_q, Tensor? seqused_k, Tensor? leftpad_k, " \
  "Tensor? block_table, Tensor? cache_batch_idx, Tensor? scheduler_metadata, SymInt max_seqlen_q, "       \
  "SymInt max_seqlen_k, float softmax_scale, SymInt window_left, SymInt window_right, float softcap, "    \
  "float dropout_p, SymInt num_splits, bool? pack_gqa, bool deterministic, int arch"

struct ForwardArgs {
  Tensor q;
  Tensor k;
  Tensor v;
  std::optional<Tensor> s_aux;
  std::optional<Tensor> alibi_slopes;
  std::optional<Tensor> rng_state;
  std::optional<Tensor> cu_seqlens_q;
  std::optional<Tensor> cu_seqlens_k;
  std::optional<Tensor> seqused_q;
  std::optional<Tensor> seqused_k;
  std::optional<Tensor> leftpad_k;
  std::optional<Tensor> block_table;
  std::optional<Tensor> cache_batch_idx;
  std::optional<Tensor> scheduler_metadata;
  int64_t max_seqlen_q;
  int64_t max_seqlen_k;
  double softmax_scale;
  int64_t window_left;
  int64_t window_right;
  double softcap;
  double dropout_p;
  int64_t num_splits;
  std::optional<bool> pack_gqa;
  bool deterministic;  // of the backward that autograd will run
  int64_t arch;
};

// Takes arguments off the dispatcher's stack in order; each is owned by whoever takes it.
class StackReader {
 public:
  explicit StackReader(StableIValue* stack) : next_(stack) {}

  template <class T>
  T take() {
    return torch::stable::detail::to<T>(*next_++);
  }

 private:
  StableIValue* next_;
};

inline ForwardArgs take_forward_args(StackReader& stack) {
  using OptionalTensor = std::optional<Tensor>;
  return {.q = stack.take<Tensor>(),
          .k = stack.take<Tensor>(),
          .v = stack.take<Tensor>(),
          .s_aux = stack.take<OptionalTensor>(),
          .alibi_slopes = stack.take<OptionalTensor>(),
          .rng_state = stack.take<OptionalTensor>(),
          .cu_seqlens_q = stack.take<OptionalTensor>(),
          .cu_seqlens_k = stack.take<OptionalTensor>(),
          .seqused_q = stack.take<OptionalTensor>(),
          .seqused_k = stack.take<OptionalTensor>(),
          .leftpad_k = stack.take<OptionalTensor>(),
          .block_table = stack.take<OptionalTensor>(),
          .cache_batch_idx = stack.take<OptionalTensor>(),
          .scheduler_metadata = stack.take<OptionalTensor>(),
          .max_seqlen_q = stack.take<int64_t>(),
          .max_seqlen_k = stack.take<int64_t>(),
          .softmax_scale = stack.take<double>(),
          .window_left = stack.take<int64_t>(),
          .window_right = stack.take<int64_t>(),
          .softcap = stack.take<double>(),
          .dropout_p = stack.take<double>(),
          .num_splits = stack.take<int64_t>(),
          .pack_gqa = stack.take<std::optional<bool>>(),
          .deterministic = stack.take<bool>(),
          .arch = stack.take<int64_t>()};
}

}  // namespace flash_attn

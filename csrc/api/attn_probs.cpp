#include "api/attn_probs.h"

#include <torch/csrc/stable/accelerator.h>

#include <utility>

#include "api/cuda_error.h"
#include "api/cuda_stream.h"
#include "api/params_of.h"
#include "api/problem_of.h"
#include "kernels/misc/attn_probs.h"
#include "variant/rounding.h"

namespace flash_attn {
AttnProbsArgs take_attn_probs_args(StackReader& stack) {
  using OptionalTensor = std::optional<Tensor>;
  Tensor q = stack.take<Tensor>();
  Tensor k = stack.take<Tensor>();
  Tensor lse = stack.take<Tensor>();
  return {.lse = std::move(lse),
          .forward = {.q = std::move(q),
                      .k = k,
                      .v = k,
                      .alibi_slopes = stack.take<OptionalTensor>(),
                      .rng_state = stack.take<OptionalTensor>(),
                      .cu_seqlens_q = stack.take<OptionalTensor>(),
                      .cu_seqlens_k = stack.take<OptionalTensor>(),
                      .seqused_q = stack.take<OptionalTensor>(),
                      .seqused_k = stack.take<OptionalTensor>(),
                      .leftpad_k = stack.take<OptionalTensor>(),
                      .block_table = stack.take<OptionalTensor>(),
                      .cache_batch_idx = stack.take<OptionalTensor>(),
                      .max_seqlen_q = stack.take<int64_t>(),
                      .max_seqlen_k = stack.take<int64_t>(),
                      .softmax_scale = stack.take<double>(),
                      .window_left = stack.take<int64_t>(),
                      .window_right = stack.take<int64_t>(),
                      .softcap = stack.take<double>(),
                      .dropout_p = stack.take<double>(),
                      .num_splits = 1,
                      .arch = static_cast<int64_t>(Arch::kSm80)}};
}

Tensor attn_probs(const AttnProbsArgs& args) {
  const ForwardArgs& forward = args.forward;
  const Problem problem = make_problem(forward);
  check_like("lse", args.lse, forward.q, ScalarType::Float);
  check(sizes_of(args.lse) == lse_shape_of(problem), "lse must be the forward's, got ", shape_of(args.lse));
  // The longest lengths are in the result's shape, and packed tensors don't have them.
  const bool packed_q = forward.cu_seqlens_q.has_value();
  const bool packed_k = forward.cu_seqlens_k.has_value() || forward.block_table.has_value();
  const int64_t rows = packed_q ? forward.max_seqlen_q : forward.q.size(1);
  const int64_t columns = packed_k ? forward.max_seqlen_k : forward.k.size(1);
  check(rows >= 0 && rows <= kMaxRows, "max_seqlen_q must be in [0, ", kMaxRows, "], got ", rows);
  check(columns >= 0 && columns <= kMaxRows, "max_seqlen_k must be in [0, ", kMaxRows, "], got ", columns);

  const torch::stable::accelerator::DeviceGuard guard(forward.q.get_device_index());
  const Tensor lse = torch::stable::contiguous(args.lse);
  const Tensor q = with_vector_rows(forward.q);
  const Tensor k = with_vector_rows(forward.k);
  const Tensor probs = allocate_like(
      forward.q, {problem.batch, problem.num_heads, round_up(rows, kProbsMultiple), round_up(columns, kProbsMultiple)});
  const AttnProbsParams params{.q = operand_of(q),
                               .k = operand_of(k),
                               .lse = lse_operand_of(lse),
                               .heads = head_params_of(problem),
                               .seq = seq_params_of(forward, problem),
                               .page = page_params_of(forward),
                               .window = window_params_of(problem),
                               .score = score_params_of(forward),
                               .dropout = dropout_params_of(forward),
                               .probs = probs.mutable_data_ptr(),
                               .num_rows = static_cast<int>(probs.size(2)),
                               .num_columns = static_cast<int>(probs.size(3))};
  const cudaError_t error = launch_attn_probs(params, problem.dtype, current_stream(forward.q));
  check_cuda(error, "launching the kernel of return_attn_probs");
  return probs;
}

}  // namespace flash_attn

#include "api/backward.h"

#include <torch/csrc/stable/accelerator.h>

#include <vector>

#include "api/cuda_stream.h"
#include "api/params_of.h"
#include "api/problem_of.h"
#include "kernels/common/launch.h"
#include "kernels/misc/row_statistics.h"
#include "plan/backward_plan.h"

namespace flash_attn {
namespace {

std::vector<int64_t> sizes_of(const Tensor& tensor) { return {tensor.sizes().begin(), tensor.sizes().end()}; }

void check_like(const char* name, const Tensor& tensor, const Tensor& like, ScalarType dtype, const char* whose) {
  check(tensor.device() == like.device(), name, " must be on q's device");
  check(tensor.scalar_type() == dtype, name, " must have ", whose, " dtype");
  check(sizes_of(tensor) == sizes_of(like), name, " must have the shape ", shape_of(like), ", got ", shape_of(tensor));
}

void check_backward(const BackwardArgs& args, const Problem& problem) {
  const Tensor& q = args.forward.q;
  std::vector<int64_t> shape = sizes_of(q);
  shape.back() = problem.head_dim_v;
  check(sizes_of(args.out) == shape && args.out.scalar_type() == q.scalar_type() && args.out.device() == q.device(),
        "out must be the forward's, with q's shape and v's head_dim, got ", shape_of(args.out));
  std::vector<int64_t> lse_shape{problem.num_heads, problem.rows_q};
  if (problem.layout == Layout::kDense) lse_shape.insert(lse_shape.begin(), problem.batch);
  check(
      sizes_of(args.lse) == lse_shape && args.lse.scalar_type() == ScalarType::Float && args.lse.device() == q.device(),
      "lse must be the forward's, got ", shape_of(args.lse));
  check(args.dout || args.dlse, "dout or dlse must be given");
  if (args.dout) check_like("dout", *args.dout, args.out, q.scalar_type(), "q's");
  if (args.dlse) check_like("dlse", *args.dlse, args.lse, ScalarType::Float, "lse's");
}

Gradients make_gradients(const ForwardArgs& args, const std::optional<Gradients>& given) {
  if (!given) {
    return {torch::stable::new_empty(args.q, sizes_of(args.q)), torch::stable::new_empty(args.k, sizes_of(args.k)),
            torch::stable::new_empty(args.v, sizes_of(args.v))};
  }
  check_like("dq", given->dq, args.q, args.q.scalar_type(), "q's");
  check_like("dk", given->dk, args.k, args.q.scalar_type(), "q's");
  check_like("dv", given->dv, args.v, args.q.scalar_type(), "q's");
  return *given;
}

Tensor float_copy(const Tensor& tensor) {
  return torch::stable::contiguous(torch::stable::to(tensor, ScalarType::Float));
}

float* floats_of(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

// Bytes: 8 for each query row and head, and 4 for each element of dQ, its rows rounded up to tiles and its columns to
// the head-dim bucket.
struct Workspace {
  Tensor lse_log2;
  Tensor delta;
  Tensor dq_sums;
  std::optional<Tensor> turns;

  Workspace(const BackwardArgs& args, const BackwardPlan& plan)
      : lse_log2(torch::stable::new_empty(args.lse, sizes_of(args.lse))),
        delta(torch::stable::new_empty(args.lse, sizes_of(args.lse))),
        dq_sums(torch::stable::new_zeros(args.lse, {plan.num_dq_sums})) {
    if (args.forward.deterministic) turns = torch::stable::new_zeros(args.lse, {plan.num_dq_counters}, ScalarType::Int);
  }
};

RowStatistics row_statistics_of(const Tensor& lse, const std::optional<Tensor>& dlse, const Workspace& workspace) {
  return {.lse = floats_of(lse),
          .dlse = dlse ? floats_of(*dlse) : nullptr,
          .lse_log2 = floats_of(workspace.lse_log2),
          .delta = floats_of(workspace.delta),
          .batch_stride = lse.dim() == 3 ? lse.stride(0) : 0,
          .head_stride = lse.stride(lse.dim() - 2)};
}

}  // namespace

BackwardResult run_backward(const BackwardArgs& args, const std::optional<Gradients>& grads) {
  const ForwardArgs& forward = args.forward;
  const Problem problem = make_problem(forward);
  check_backward(args, problem);
  const BackwardPlan plan = make_backward_plan(problem, arch_of(forward.arch), smem_limit_of(forward.q));
  const BackwardLaunch launch = find_backward_kernel(plan.variant);
  check(launch != nullptr, "the backward kernel for ", plan,
        " was left out of this build by FLASH_ATTN_ARCHS, FLASH_ATTN_HEAD_DIMS or FLASH_ATTN_DTYPES");

  const torch::stable::accelerator::DeviceGuard guard(forward.q.get_device_index());
  const Gradients returned = make_gradients(forward, grads);
  OutputTarget dq = output_target_of(returned.dq);
  OutputTarget dk = output_target_of(returned.dk);
  OutputTarget dv = output_target_of(returned.dv);
  const Workspace workspace(args, plan);
  // All held until the launch: the params point into them.
  const Tensor q = with_vector_rows(forward.q);
  const Tensor k = with_vector_rows(forward.k);
  const Tensor v = with_vector_rows(forward.v);
  const Tensor out = with_vector_rows(args.out);
  const Tensor dout = with_vector_rows(args.dout ? *args.dout : torch::stable::new_zeros(args.out, sizes_of(args.out)));
  const Tensor lse = torch::stable::contiguous(args.lse);
  const std::optional<Tensor> dlse = args.dlse ? std::optional(torch::stable::contiguous(*args.dlse)) : std::nullopt;
  const std::optional<Tensor> sink = forward.s_aux ? std::optional(float_copy(*forward.s_aux)) : std::nullopt;
  const Tensor ds_aux = torch::stable::new_empty(lse, {sink ? problem.num_heads : 0});

  const BackwardParams params{
      .q = operand_of(q),
      .k = operand_of(k),
      .v = operand_of(v),
      .o = operand_of(out),
      .dout = operand_of(dout),
      .dq = operand_of(dq.written),
      .dk = operand_of(dk.written),
      .dv = operand_of(dv.written),
      .rows = row_statistics_of(lse, dlse, workspace),
      .dq_sums = {floats_of(workspace.dq_sums), static_cast<int>(plan.query_tiles_per_head)},
      .turns = {workspace.turns ? static_cast<int*>(workspace.turns->mutable_data_ptr()) : nullptr},
      .heads = head_params_of(problem),
      .seq = seq_params_of(forward, problem),
      .key_tiles_per_head = static_cast<int>(plan.key_tiles_per_head),
      .window = window_params_of(problem),
      .score = score_params_of(forward),
      .grad_scale = static_cast<float>(forward.softmax_scale),
      .dropout = dropout_params_of(forward),
      .sink = {sink ? floats_of(*sink) : nullptr},
      .ds_aux = floats_of(ds_aux)};
  const cudaStream_t stream = current_stream(forward.q);
  cudaError_t error = launch_row_statistics(params, problem.dtype, stream);
  if (error == cudaSuccess) {
    error = launch(params, {static_cast<int>(plan.num_key_blocks), static_cast<int>(plan.num_query_blocks), stream});
  }
  check(error == cudaSuccess, "launching ", plan, " failed: ", cudaGetErrorString(error));
  dq.finish();
  dk.finish();
  dv.finish();
  return {returned, forward.s_aux ? torch::stable::to(ds_aux, forward.s_aux->scalar_type()) : ds_aux};
}

std::string explain_backward(const ForwardArgs& args) {
  const int smem_limit = args.q.is_cuda() ? smem_limit_of(args.q) : bytes_of(SmemClass::k227KB);
  return describe(make_backward_plan(make_problem(args), arch_of(args.arch), smem_limit));
}

}  // namespace flash_attn

#include "api/backward.h"

#include <torch/csrc/stable/accelerator.h>

#include <vector>

#include "api/cuda_error.h"
#include "api/cuda_stream.h"
#include "api/params_of.h"
#include "api/problem_of.h"
#include "kernels/common/launch.h"
#include "kernels/misc/row_statistics.h"
#include "plan/backward_plan.h"

namespace flash_attn {
namespace {

void check_same_shape(const char* name, const Tensor& tensor, const Tensor& like, ScalarType dtype, const char* whose) {
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
  check(sizes_of(args.lse) == lse_shape_of(problem) && args.lse.scalar_type() == ScalarType::Float &&
            args.lse.device() == q.device(),
        "lse must be the forward's, got ", shape_of(args.lse));
  check(args.dout || args.dlse, "dout or dlse must be given");
  if (args.dout) check_same_shape("dout", *args.dout, args.out, q.scalar_type(), "q's");
  if (args.dlse) check_same_shape("dlse", *args.dlse, args.lse, ScalarType::Float, "lse's");
}

void check_gradients(const BackwardArgs& args, const Gradients& grads) {
  const ForwardArgs& forward = args.forward;
  check_same_shape("dq", grads.dq, forward.q, forward.q.scalar_type(), "q's");
  check_same_shape("dk", grads.dk, forward.k, forward.q.scalar_type(), "q's");
  check_same_shape("dv", grads.dv, forward.v, forward.q.scalar_type(), "q's");
  const Extent dq(grads.dq), dk(grads.dk), dv(grads.dv);
  check(!dq.surely_overlaps(dk) && !dq.surely_overlaps(dv) && !dk.surely_overlaps(dv),
        "dq, dk and dv must not overlap one another: all are written");
  // dQ comes last; a block of keys writes its dK and dV while others read the queries, and, where two blocks share the
  // columns, the same keys.
  for (const Tensor& tensor : {forward.q, forward.k, forward.v, args.dout.value_or(forward.q)}) {
    const Extent read(tensor);
    check(!dk.surely_overlaps(read) && !dv.surely_overlaps(read),
          "dk and dv must not overlap q, k, v or dout, which are read while they are written");
  }
}

Gradients make_gradients(const BackwardArgs& args, const std::optional<Gradients>& given) {
  const ForwardArgs& forward = args.forward;
  if (!given) {
    return {allocate_like(forward.q, sizes_of(forward.q)), allocate_like(forward.k, sizes_of(forward.k)),
            allocate_like(forward.v, sizes_of(forward.v))};
  }
  check_gradients(args, *given);
  return *given;
}

Tensor float_copy(const Tensor& tensor) {
  return torch::stable::contiguous(torch::stable::to(tensor, ScalarType::Float));
}

float* floats_of(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

// One allocation of float32: dQ's sums, its rows rounded up to tiles and its columns to the head-dim bucket; the turn
// counters; log-sum-exp and delta of each query row and head.
class Workspace {
 public:
  Workspace(const BackwardArgs& args, const BackwardPlan& plan)
      : num_sums_(plan.num_dq_sums),
        num_turns_(args.forward.deterministic ? plan.num_dq_counters + 1 : 0),
        num_rows_(args.lse.numel()),
        memory_(allocate(args.lse, {num_sums_ + num_turns_ + 2 * num_rows_}, ScalarType::Float)) {}

  // What thread blocks add to.
  cudaError_t clear(cudaStream_t stream) const {
    const size_t bytes = (num_sums_ + num_turns_) * sizeof(float);
    return bytes == 0 ? cudaSuccess : cudaMemsetAsync(dq_sums(), 0, bytes, stream);
  }
  float* dq_sums() const { return floats_of(memory_); }
  TurnParams turns() const {
    if (num_turns_ == 0) return {nullptr, nullptr};
    int* counters = reinterpret_cast<int*>(dq_sums() + num_sums_);
    return {counters, counters + num_turns_ - 1};
  }
  float* lse_log2() const { return dq_sums() + num_sums_ + num_turns_; }
  float* delta() const { return lse_log2() + num_rows_; }

 private:
  int64_t num_sums_;
  int64_t num_turns_;  // and the word that says whether they are lost
  int64_t num_rows_;
  Tensor memory_;
};

RowStatistics row_statistics_of(const Tensor& lse, const std::optional<Tensor>& dlse, const Workspace& workspace) {
  return {.lse = floats_of(lse),
          .dlse = dlse ? floats_of(*dlse) : nullptr,
          .lse_log2 = workspace.lse_log2(),
          .delta = workspace.delta(),
          .batch_stride = lse.dim() == 3 ? lse.stride(0) : 0,
          .head_stride = lse.stride(lse.dim() - 2)};
}

}  // namespace

BackwardResult run_backward(const BackwardArgs& args, const std::optional<Gradients>& grads) {
  const ForwardArgs& forward = args.forward;
  const Problem problem = make_problem(forward);
  check_backward(args, problem);
  const BackwardPlan plan = make_backward_plan(problem, smem_limit_of(forward.q));
  const BackwardLaunch launch = find_backward_kernel(plan.variant);
  check(launch != nullptr, "the backward kernel for ", plan,
        " was left out of this build by FLASH_ATTN_ARCHS, FLASH_ATTN_HEAD_DIMS or FLASH_ATTN_DTYPES");

  const torch::stable::accelerator::DeviceGuard guard(forward.q.get_device_index());
  const Gradients returned = make_gradients(args, grads);
  OutputTarget dq = output_target_of(returned.dq, Arch::kSm80);
  OutputTarget dk = output_target_of(returned.dk, Arch::kSm80);
  OutputTarget dv = output_target_of(returned.dv, Arch::kSm80);
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
  const Tensor ds_aux = allocate(lse, {sink ? problem.num_heads : 0}, ScalarType::Float);

  const BackwardParams params{.q = operand_of(q),
                              .k = operand_of(k),
                              .v = operand_of(v),
                              .o = operand_of(out),
                              .dout = operand_of(dout),
                              .dq = operand_of(dq.written),
                              .dk = operand_of(dk.written),
                              .dv = operand_of(dv.written),
                              .rows = row_statistics_of(lse, dlse, workspace),
                              .dq_sums = {workspace.dq_sums(), static_cast<int>(plan.query_tiles_per_head)},
                              .turns = workspace.turns(),
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
  cudaError_t error = workspace.clear(stream);
  if (error == cudaSuccess) error = launch_row_statistics(params, problem.dtype, stream);
  if (error == cudaSuccess) {
    error = launch(params, {static_cast<int>(plan.num_key_blocks), static_cast<int>(plan.num_query_blocks), stream});
  }
  check_cuda(error, "launching ", plan);
  dq.finish();
  dk.finish();
  dv.finish();
  return {returned, forward.s_aux ? torch::stable::to(ds_aux, forward.s_aux->scalar_type()) : ds_aux};
}

std::string explain_backward(const ForwardArgs& args) {
  const int smem_limit = args.q.is_cuda() ? smem_limit_of(args.q) : bytes_of(SmemClass::k227KB);
  return describe(make_backward_plan(make_problem(args), smem_limit));
}

}  // namespace flash_attn

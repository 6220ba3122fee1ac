#include "api/forward.h"

#include <torch/csrc/stable/accelerator.h>

#include <vector>

#include "api/cuda_error.h"
#include "api/cuda_stream.h"
#include "api/params_of.h"
#include "api/problem_of.h"
#include "kernels/common/launch.h"
#include "plan/plan.h"

namespace flash_attn {
namespace {

OutputTarget make_output(const ForwardArgs& args, const std::optional<Tensor>& out, Arch arch) {
  std::vector<int64_t> shape = sizes_of(args.q);
  shape.back() = args.v.size(args.v.dim() - 1);
  Tensor returned = out ? *out : allocate_like(args.q, shape);
  if (out) {
    check(out->scalar_type() == args.q.scalar_type(), "out must have q's dtype");
    check(out->device() == args.q.device(), "out must be on q's device");
    check(sizes_of(*out) == shape, "out must have q's shape with v's head_dim, got ", shape_of(*out));
    // Where q was, each tile is read before it is written; K and V are read by all.
    const Extent written(*out);
    check(!written.surely_overlaps(Extent(args.k)) && !written.surely_overlaps(Extent(args.v)),
          "out must not overlap the keys or values, which are read while it is written");
  }
  return output_target_of(returned, arch);
}

// What explain() plans for where there is no GPU: the one that the kernels are tuned for.
constexpr Gpu kH200{.smem_limit = bytes_of(SmemClass::k227KB), .num_sms = 132};

// The parts' results, until they are merged. Its size depends on shapes alone.
struct SplitWorkspace {
  std::optional<Tensor> memory;
  SplitParams params;
};

SplitWorkspace make_split_workspace(const ForwardArgs& args, const Problem& problem, const Plan& plan) {
  SplitWorkspace workspace{.memory = std::nullopt,
                           .params = {.packed_heads = FastDivisor(plan.split.packed_heads),
                                      .num_slots = static_cast<int>(plan.split.num_slots),
                                      .num_splits = plan.split.num_splits,
                                      .target_slots = plan.split.target_slots,
                                      .min_tiles = plan.split.min_tiles}};
  if (!plan.split.needs_merge()) return workspace;
  static_assert(sizeof(SplitParams::Entry) == 2 * sizeof(float));
  const int64_t num_rows = plan.num_blocks * plan.tile.m;
  const int64_t o_size = num_rows * round_up_to_vector(problem.head_dim_v);
  workspace.memory = allocate(args.q, {o_size + num_rows + 2 * problem.batch}, ScalarType::Float);
  workspace.params.o = static_cast<float*>(workspace.memory->mutable_data_ptr());
  workspace.params.lse = workspace.params.o + o_size;
  workspace.params.entries = reinterpret_cast<SplitParams::Entry*>(workspace.params.lse + num_rows);
  return workspace;
}

// SM90 without clusters: the counter by which thread blocks take tiles when lengths are on the device; none if there
// are no more tiles than SMs.
std::optional<Tensor> make_tile_counter(const ForwardArgs& args, const Plan& plan, const SeqParams& seq, int num_sms) {
  if (plan.variant.arch != Arch::kSm90 || plan.tile.cluster > 1) return std::nullopt;
  if (!seq.has_lengths() || plan.num_blocks <= num_sms) return std::nullopt;
  return allocate(args.q, {1}, ScalarType::Int);
}

// In a build without SM80's kernels SM90's serve the calls that those would serve better.
Plan make_plan_of_built(Problem problem, Arch preferred, const Gpu& gpu) {
  const Plan plan = make_plan(problem, preferred, gpu);
  if (plan.variant.arch == preferred || find_forward_kernel(plan.variant) != nullptr) return plan;
  problem.allows_few_rows = false;
  return make_plan(problem, preferred, gpu);
}

}  // namespace

ForwardResult run_forward(const ForwardArgs& args, const std::optional<Tensor>& out) {
  const Problem problem = make_problem(args);
  const Gpu gpu = gpu_of(args.q);
  const Plan plan = make_plan_of_built(problem, arch_of(args.arch), gpu);
  const ForwardLaunch launch = find_forward_kernel(plan.variant);
  check(launch != nullptr, "the kernel for ", plan,
        " was left out of this build by FLASH_ATTN_ARCHS, FLASH_ATTN_HEAD_DIMS or FLASH_ATTN_DTYPES");

  const torch::stable::accelerator::DeviceGuard guard(args.q.get_device_index());
  OutputTarget output = make_output(args, out, plan.variant.arch);
  const Tensor lse = allocate(args.q, lse_shape_of(problem), ScalarType::Float);
  const Tensor q = as_operand("q", args.q, OperandRole::kQueries, plan.variant.arch);
  const Tensor k = as_operand("k", args.k, OperandRole::kKeys, plan.variant.arch);
  const Tensor v = as_operand("v", args.v, OperandRole::kKeys, plan.variant.arch);
  // Held until the launch: the params point into them.
  const SplitWorkspace workspace = make_split_workspace(args, problem, plan);
  const std::optional<Tensor> sink =
      args.s_aux ? std::optional(torch::stable::contiguous(torch::stable::to(*args.s_aux, ScalarType::Float)))
                 : std::nullopt;
  const ForwardParams params{.q = operand_of(q),
                             .k = operand_of(k),
                             .v = operand_of(v),
                             .o = operand_of(output.written),
                             .lse = lse_operand_of(lse),
                             .heads = head_params_of(problem),
                             .seq = seq_params_of(args, problem),
                             .page = page_params_of(args),
                             .tiles_per_head = static_cast<int>(plan.tiles_per_head),
                             .window = window_params_of(problem),
                             .score = score_params_of(args),
                             .sink = {sink ? static_cast<const float*>(sink->const_data_ptr()) : nullptr},
                             .dropout = dropout_params_of(args),
                             .split = workspace.params};
  if (plan.num_blocks > 0 && problem.rows_q > 0) {  // TMA takes no descriptor of a null pointer
    const std::optional<Tensor> counter = make_tile_counter(args, plan, params.seq, gpu.num_sms);
    const cudaError_t error =
        launch(params, {.num_blocks = static_cast<int>(plan.num_blocks),
                        .cluster_blocks = plan.tile.cluster,
                        .num_sms = gpu.num_sms,
                        .tile_counter = counter ? static_cast<int*>(counter->mutable_data_ptr()) : nullptr,
                        .stream = current_stream(args.q)});
    check_cuda(error, "launching ", plan);
  }
  output.finish();
  return {output.returned, lse};
}

std::string explain_forward(const ForwardArgs& args) {
  const Gpu gpu = args.q.is_cuda() ? gpu_of(args.q) : kH200;
  const Problem problem = make_problem(args);
  const Plan plan = make_plan_of_built(problem, arch_of(args.arch), gpu);
  std::string json = describe(plan);
  json.pop_back();  // the brace that closes it
  json += std::string(", \"pages_need_sm80\": ") + (problem.pages_need_sm80() ? "true" : "false");
  json += ", \"copies\": [";
  const char* separator = "";
  const auto list = [&](const char* name, const Tensor& tensor, OperandRole role) {
    if (can_be_operand(tensor, role, plan.variant.arch)) return;
    json += std::string(separator) + "\"" + name + "\"";
    separator = ", ";
  };
  list("q", args.q, OperandRole::kQueries);
  list("k", args.k, OperandRole::kKeys);
  list("v", args.v, OperandRole::kKeys);
  return json + "]}";
}

}  // namespace flash_attn

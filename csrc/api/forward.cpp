#include "api/forward.h"

#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <cmath>
#include <sstream>
#include <vector>

#include "api/cuda_stream.h"
#include "api/problem_of.h"
#include "kernels/common/launch.h"
#include "plan/plan.h"

namespace flash_attn {
namespace {

constexpr int64_t kVectorElements = 8;

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// The tensor itself where the kernels can read it, else a copy that they can: rows contiguous, 16-byte aligned, and
// their length a multiple of 16 bytes.
Tensor with_vector_rows(const Tensor& tensor) {
  if (has_vector_rows(tensor)) return tensor;
  const int64_t last = tensor.dim() - 1;
  const int64_t head_dim = tensor.size(last);
  std::vector<int64_t> shape(tensor.sizes().begin(), tensor.sizes().end());
  shape.back() = round_up(head_dim, kVectorElements);
  // Not aten::pad, which keeps the order of dimensions in memory: rows that were not contiguous would stay so.
  Tensor copy =
      shape.back() == head_dim ? torch::stable::new_empty(tensor, shape) : torch::stable::new_zeros(tensor, shape);
  Tensor head_dim_part = torch::stable::narrow(copy, last, 0, head_dim);
  torch::stable::copy_(head_dim_part, tensor);
  return copy;
}

// Where the kernel writes: `out`, unless its rows can't be written in pieces of 16 bytes.
struct OutputTarget {
  Tensor written;
  Tensor returned;

  void finish() {
    if (written.get() == returned.get()) return;
    const int64_t last = returned.dim() - 1;
    torch::stable::copy_(returned, torch::stable::narrow(written, last, 0, returned.size(last)));
  }
};

OutputTarget make_output(const ForwardArgs& args, const std::optional<Tensor>& out) {
  std::vector<int64_t> shape(args.q.sizes().begin(), args.q.sizes().end());
  const int64_t head_dim_v = args.v.size(args.v.dim() - 1);
  shape.back() = head_dim_v;
  Tensor returned = out ? *out : torch::stable::new_empty(args.q, shape);
  if (out) {
    check(out->scalar_type() == args.q.scalar_type(), "out must have q's dtype");
    check(out->device() == args.q.device(), "out must be on q's device");
    bool equal = out->dim() == static_cast<int64_t>(shape.size());
    for (size_t dim = 0; equal && dim < shape.size(); ++dim) equal = out->size(dim) == shape[dim];
    check(equal, "out must have q's shape with v's head_dim, got ", shape_of(*out));
  }
  if (has_vector_rows(returned)) return {returned, returned};
  shape.back() = round_up(head_dim_v, kVectorElements);
  return {torch::stable::new_empty(args.q, shape), returned};
}

Tensor make_lse(const ForwardArgs& args, const Problem& problem) {
  std::vector<int64_t> shape;
  if (problem.layout == Layout::kDense) shape.push_back(problem.batch);
  shape.insert(shape.end(), {problem.num_heads, problem.rows_q});
  return torch::stable::new_empty(args.q, shape, ScalarType::Float);
}

LseOperand lse_operand_of(const Tensor& lse) {
  return {.ptr = static_cast<float*>(lse.mutable_data_ptr()),
          .batch_stride = lse.dim() == 3 ? lse.stride(0) : 0,
          .head_stride = lse.stride(lse.dim() - 2)};
}

const int* int_pointer(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const int*>(tensor->const_data_ptr()) : nullptr;
}

SeqParams seq_params_of(const ForwardArgs& args, const Problem& problem) {
  return {.batch = static_cast<int>(problem.batch),
          .rows_q = static_cast<int>(problem.rows_q),
          .rows_k = static_cast<int>(problem.rows_k),
          .cu_seqlens_q = int_pointer(args.cu_seqlens_q),
          .cu_seqlens_k = int_pointer(args.cu_seqlens_k),
          .seqused_q = int_pointer(args.seqused_q),
          .seqused_k = int_pointer(args.seqused_k)};
}

// The head dims are those of the padded rows: the zeros that padding adds to a row of Q and K add nothing to a score.
HeadParams head_params_of(const Problem& problem) {
  return {.num_heads = static_cast<int>(problem.num_heads),
          .num_heads_per_kv = static_cast<int>(problem.num_heads / problem.num_heads_k),
          .head_dim = static_cast<int>(round_up(problem.head_dim, kVectorElements)),
          .head_dim_v = static_cast<int>(round_up(problem.head_dim_v, kVectorElements))};
}

// An infinite side is as wide as the keys are many, which hides none of them.
WindowParams window_params_of(const Problem& problem) {
  const int64_t widest = std::max(problem.rows_q, problem.rows_k);
  const auto side = [&](int64_t width) { return static_cast<int>(width < 0 ? widest : std::min(width, widest)); };
  return {.left = side(problem.window_left), .right = side(problem.window_right)};
}

ScoreParams score_params_of(const ForwardArgs& args) {
  const float scale = static_cast<float>(args.softmax_scale);
  const float softcap = static_cast<float>(args.softcap);
  const bool has_slopes = args.alibi_slopes.has_value();
  ScoreParams score{
      .factor = 1.f,
      .softmax_scale = scale,
      .has_softcap = softcap > 0.f,
      .alibi_slopes = has_slopes ? static_cast<const float*>(args.alibi_slopes->const_data_ptr()) : nullptr,
      .alibi_batch_stride = has_slopes && args.alibi_slopes->dim() == 2 ? args.alibi_slopes->stride(0) : 0};
  if (score.has_softcap) {
    score.factor = scale / softcap;
    score.softmax_scale = softcap;
  } else if (scale <= 0.f) {
    score.factor = scale;
    score.softmax_scale = 1.f;
  }
  return score;
}

DropoutParams dropout_params_of(const ForwardArgs& args) {
  if (args.dropout_p == 0.0) return {.rng_state = nullptr, .keep_threshold = 255, .rescale = 1.f};
  constexpr double kLargestByte = 255.0;
  return {.rng_state = static_cast<const int64_t*>(args.rng_state->const_data_ptr()),
          .keep_threshold = static_cast<int>(std::floor(kLargestByte * (1.0 - args.dropout_p))),
          .rescale = static_cast<float>(1.0 / (1.0 - args.dropout_p))};
}

int smem_limit_of(const Tensor& tensor) {
  int bytes = 0;
  const cudaError_t error =
      cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, tensor.get_device_index());
  check(error == cudaSuccess, "reading the shared memory of q's device failed: ", cudaGetErrorString(error));
  return bytes;
}

Arch arch_of(const ForwardArgs& args) {
  check(args.arch == 80 || args.arch == 90, "arch must be 80 or 90, got ", args.arch);
  return static_cast<Arch>(args.arch);
}

}  // namespace

ForwardResult run_forward(const ForwardArgs& args, const std::optional<Tensor>& out) {
  const Problem problem = make_problem(args);
  const Plan plan = make_plan(problem, arch_of(args), smem_limit_of(args.q));
  const ForwardLaunch launch = find_forward_kernel(plan.variant);
  check(launch != nullptr, "the kernel for ", describe(plan),
        " was left out of this build by FLASH_ATTN_ARCHS, "
        "FLASH_ATTN_HEAD_DIMS or FLASH_ATTN_DTYPES");

  const torch::stable::accelerator::DeviceGuard guard(args.q.get_device_index());
  OutputTarget output = make_output(args, out);
  Tensor lse = make_lse(args, problem);
  const Tensor q = with_vector_rows(args.q);
  const Tensor k = with_vector_rows(args.k);
  const Tensor v = with_vector_rows(args.v);
  // Held until the launch: the params point into it.
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
                             .tiles_per_head = static_cast<int>(plan.tiles_per_head),
                             .window = window_params_of(problem),
                             .score = score_params_of(args),
                             .sink = {sink ? static_cast<const float*>(sink->const_data_ptr()) : nullptr},
                             .dropout = dropout_params_of(args)};
  if (plan.num_blocks > 0) {
    const cudaError_t error = launch(params, {static_cast<int>(plan.num_blocks), current_stream(args.q)});
    check(error == cudaSuccess, "launching ", describe(plan), " failed: ", cudaGetErrorString(error));
  }
  output.finish();
  return {output.returned, lse};
}

std::string explain_forward(const ForwardArgs& args) {
  const int smem_limit = args.q.is_cuda() ? smem_limit_of(args.q) : bytes_of(SmemClass::k227KB);
  return describe(make_plan(make_problem(args), arch_of(args), smem_limit));
}

std::string built_kernels() {
  std::ostringstream json;
  json << "{\"tile_rows\": {\"80\": [";
  const char* separator = "";
  for (const TileRow& row : kForwardTilesSm80) {
    json << separator << "[" << row.head_dim.qk << ", " << row.head_dim.v << ", " << bytes_of(row.smem) << "]";
    separator = ", ";
  }
  json << "]}, \"forward\": [";
  separator = "";
  const ForwardKernels kernels = built_forward_kernels();
  for (const ForwardKernel* kernel = kernels.begin; kernel != kernels.end; ++kernel) {
    const Variant& variant = kernel->variant;
    json << separator << "{\"arch\": " << static_cast<int>(variant.arch) << ", \"dtype\": \"" << name_of(variant.dtype)
         << "\", \"tile_row\": [" << variant.head_dim.qk << ", " << variant.head_dim.v << ", " << bytes_of(variant.smem)
         << "], \"mask\": \"" << name_of(variant.mask) << "\"}";
    separator = ", ";
  }
  json << "]}";
  return json.str();
}

}  // namespace flash_attn

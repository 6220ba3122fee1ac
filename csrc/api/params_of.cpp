#include "api/params_of.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "api/cuda_error.h"
#include "variant/rounding.h"

namespace flash_attn {

int64_t round_up_to_vector(int64_t head_dim) { return round_up(head_dim, kVectorElements); }

namespace {

Tensor copy_with_vector_rows(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  const int64_t head_dim = tensor.size(last);
  std::vector<int64_t> shape = sizes_of(tensor);
  shape.back() = round_up_to_vector(head_dim);
  // Not aten::pad, which keeps the order of dimensions in memory: rows that were not contiguous would stay so.
  Tensor copy = shape.back() == head_dim ? allocate_like(tensor, shape) : torch::stable::new_zeros(tensor, shape);
  Tensor head_dim_part = torch::stable::narrow(copy, last, 0, head_dim);
  torch::stable::copy_(head_dim_part, tensor);
  return copy;
}

Tensor copied_operand(const char* name, const Tensor& tensor, OperandRole role, Arch arch) {
  Tensor copy = copy_with_vector_rows(tensor);
  check(can_be_operand(copy, role, arch), name, " must have fewer than 2^31 rows of head_dim in all entries and heads ",
        "together for the SM90 kernels, got ", shape_of(tensor), "; use_path(\"sm80\") takes it");
  return copy;
}

}  // namespace

Tensor with_vector_rows(const Tensor& tensor) {
  return has_vector_rows(tensor) ? tensor : copy_with_vector_rows(tensor);
}

Tensor as_operand(const char* name, const Tensor& tensor, OperandRole role, Arch arch) {
  return can_be_operand(tensor, role, arch) ? tensor : copied_operand(name, tensor, role, arch);
}

void OutputTarget::finish() {
  if (written.get() == returned.get()) return;
  const int64_t last = returned.dim() - 1;
  torch::stable::copy_(returned, torch::stable::narrow(written, last, 0, returned.size(last)));
}

OutputTarget output_target_of(const Tensor& returned, Arch arch) {
  if (can_be_operand(returned, OperandRole::kQueries, arch)) return {returned, returned};
  std::vector<int64_t> shape = sizes_of(returned);
  shape.back() = round_up_to_vector(shape.back());
  return {allocate_like(returned, shape), returned};
}

std::vector<int64_t> lse_shape_of(const Problem& problem) {
  if (problem.layout == Layout::kVarlen) return {problem.num_heads, problem.rows_q};
  return {problem.batch, problem.num_heads, problem.rows_q};
}

LseOperand lse_operand_of(const Tensor& lse) {
  return {.ptr = static_cast<float*>(lse.mutable_data_ptr()),
          .batch_stride = lse.dim() == 3 ? lse.stride(0) : 0,
          .head_stride = lse.stride(lse.dim() - 2)};
}

SeqParams seq_params_of(const ForwardArgs& args, const Problem& problem) {
  return {.batch = static_cast<int>(problem.batch),
          .rows_q = static_cast<int>(problem.rows_q),
          .rows_k = static_cast<int>(problem.rows_k),
          .cu_seqlens_q = int_pointer(args.cu_seqlens_q),
          .cu_seqlens_k = int_pointer(args.cu_seqlens_k),
          .seqused_q = int_pointer(args.seqused_q),
          .seqused_k = int_pointer(args.seqused_k),
          .leftpad_k = int_pointer(args.leftpad_k),
          .cache_batch_idx = int_pointer(args.cache_batch_idx),
          .num_cache_rows = static_cast<int>(args.block_table ? args.block_table->size(0) : args.k.size(0)),
          .has_pages = args.block_table.has_value()};
}

PageParams page_params_of(const ForwardArgs& args) {
  if (!args.block_table) return {};
  return {.table = int_pointer(args.block_table),
          .table_stride = args.block_table->stride(0),
          .page_size = FastDivisor(static_cast<int>(args.k.size(1))),
          .num_pages = static_cast<int>(args.k.size(0))};
}

// The head dims are those of the padded rows: the zeros that padding adds to a row of Q and K add nothing to a score.
HeadParams head_params_of(const Problem& problem) {
  return {.num_heads = static_cast<int>(problem.num_heads),
          .num_heads_per_kv = static_cast<int>(problem.num_heads_per_kv()),
          .head_dim = static_cast<int>(round_up_to_vector(problem.head_dim)),
          .head_dim_v = static_cast<int>(round_up_to_vector(problem.head_dim_v))};
}

// No key is further left of a query's diagonal than there are keys, none further right than there are queries: sides of
// that width hide none, and what kernels add to them stays an int.
WindowParams window_params_of(const Problem& problem) {
  const auto side = [](int64_t width, int64_t widest) {
    return static_cast<int>(width < 0 ? widest : std::min(width, widest));
  };
  return {.left = side(problem.window_left, problem.rows_k), .right = side(problem.window_right, problem.rows_q)};
}

ScoreParams score_params_of(const ForwardArgs& args) {
  const float scale = static_cast<float>(args.softmax_scale);
  const float softcap = static_cast<float>(args.softcap);
  const bool has_slopes = args.alibi_slopes.has_value();
  ScoreParams score{
      .score_factor = 1.f,
      .softmax_scale = scale,
      .has_softcap = softcap > 0.f,
      .alibi_slopes = has_slopes ? static_cast<const float*>(args.alibi_slopes->const_data_ptr()) : nullptr,
      .alibi_batch_stride = has_slopes && args.alibi_slopes->dim() == 2 ? args.alibi_slopes->stride(0) : 0};
  if (score.has_softcap) {
    score.score_factor = scale / softcap;
    score.softmax_scale = softcap;
  } else if (scale <= 0.f) {
    score.score_factor = scale;
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

namespace {

int attribute_of(const Tensor& tensor, cudaDeviceAttr attribute) {
  int value = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&value, attribute, tensor.get_device_index());
  check_cuda(error, "reading an attribute of q's device");
  return value;
}

}  // namespace

int smem_limit_of(const Tensor& tensor) { return attribute_of(tensor, cudaDevAttrMaxSharedMemoryPerBlockOptin); }

Gpu gpu_of(const Tensor& tensor) {
  return {.smem_limit = smem_limit_of(tensor), .num_sms = attribute_of(tensor, cudaDevAttrMultiProcessorCount)};
}

Arch arch_of(int64_t arch) {
  check(arch == 80 || arch == 90, "arch must be 80 or 90, got ", arch);
  return static_cast<Arch>(arch);
}

}  // namespace flash_attn

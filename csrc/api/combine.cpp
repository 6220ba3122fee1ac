#include "api/combine.h"

#include <torch/csrc/stable/accelerator.h>

#include <limits>
#include <vector>

#include "api/cuda_error.h"
#include "api/cuda_stream.h"
#include "kernels/misc/combine.h"

namespace flash_attn {
namespace {

CombineDtype combine_dtype_of(ScalarType dtype, const char* rule) {
  switch (dtype) {
    case ScalarType::Half:
      return CombineDtype::kFp16;
    case ScalarType::BFloat16:
      return CombineDtype::kBf16;
    case ScalarType::Float:
      return CombineDtype::kFp32;
    default:
      check(false, rule);
      return {};
  }
}

// (batch, row, head) of the dimensions [first_dim, first_dim + count), of which the last is the head.
Operand row_operand_of(const Tensor& tensor, int64_t first_dim, int64_t count) {
  const auto stride_from_last = [&](int64_t distance) {
    return distance < count ? tensor.stride(first_dim + count - 1 - distance) : 0;
  };
  return {.ptr = tensor.data_ptr(),
          .batch_stride = stride_from_last(2),
          .row_stride = stride_from_last(1),
          .head_stride = stride_from_last(0)};
}

bool has_vector_columns(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  for (int64_t dim = 0; dim < last; ++dim) {
    if (tensor.size(dim) > 1 && tensor.stride(dim) % kCombineColumns != 0) return false;
  }
  const int64_t bytes = tensor.scalar_type() == ScalarType::Float ? sizeof(float) : kElementBytes;
  const auto address = reinterpret_cast<uintptr_t>(tensor.data_ptr());
  return tensor.size(last) % kCombineColumns == 0 && address % (kCombineColumns * bytes) == 0;
}

Tensor with_contiguous_columns(const Tensor& out_partial) {
  const int64_t last = out_partial.dim() - 1;
  return out_partial.stride(last) == 1 || out_partial.size(last) == 1 ? out_partial
                                                                      : torch::stable::contiguous(out_partial);
}

}  // namespace

std::tuple<Tensor, Tensor> combine(const Tensor& out_partial, const Tensor& lse_partial,
                                   std::optional<ScalarType> out_dtype) {
  const CombineDtype part_dtype =
      combine_dtype_of(out_partial.scalar_type(), "out_partial must be float16, bfloat16 or float32");
  constexpr int64_t kMinRank = 3;
  constexpr int64_t kMaxRank = 5;
  const int64_t rank = out_partial.dim();
  check(rank >= kMinRank && rank <= kMaxRank, "out_partial must have ", kMinRank, " to ", kMaxRank, " dimensions, got ",
        shape_of(out_partial));
  check_like("lse_partial", lse_partial, out_partial, ScalarType::Float);
  bool equal = lse_partial.dim() == rank - 1;
  for (int64_t dim = 0; equal && dim < rank - 1; ++dim) equal = lse_partial.size(dim) == out_partial.size(dim);
  check(equal, "lse_partial must have out_partial's shape but for head_dim, got ", shape_of(lse_partial), " and ",
        shape_of(out_partial));
  check(out_partial.size(0) <= std::numeric_limits<int32_t>::max(), "out_partial must have fewer parts, got ",
        out_partial.size(0));

  const torch::stable::accelerator::DeviceGuard guard(out_partial.get_device_index());
  // The kernel computes in float32, which float64 only widens.
  const ScalarType returned_dtype = out_dtype.value_or(out_partial.scalar_type());
  const ScalarType written_dtype = returned_dtype == ScalarType::Double ? ScalarType::Float : returned_dtype;
  const CombineDtype kernel_dtype =
      combine_dtype_of(written_dtype, "out_dtype must be float16, bfloat16, float32 or float64");
  const std::vector<int64_t> shape(out_partial.sizes().begin() + 1, out_partial.sizes().end());
  const Tensor parts = with_contiguous_columns(out_partial);
  const Tensor out = allocate(out_partial, shape, written_dtype);
  const Tensor lse = allocate(out_partial, {shape.begin(), shape.end() - 1}, ScalarType::Float);
  // Leading dimensions are (row, head), with a batch before them or without a row.
  const int64_t num_leading = rank - 2;
  const auto size_from_last = [&](int64_t distance) {
    return distance < num_leading ? shape[num_leading - 1 - distance] : 1;
  };
  const CombineParams params{.part_out = row_operand_of(parts, 1, num_leading),
                             .part_out_stride = parts.stride(0),
                             .part_dtype = part_dtype,
                             .part_lse = row_operand_of(lse_partial, 1, num_leading),
                             .part_lse_stride = lse_partial.stride(0),
                             .out = row_operand_of(out, 0, num_leading),
                             .out_dtype = kernel_dtype,
                             .lse = row_operand_of(lse, 0, num_leading),
                             .num_parts = static_cast<int>(out_partial.size(0)),
                             .batch = size_from_last(2),
                             .num_rows = size_from_last(1),
                             .num_heads = size_from_last(0),
                             .head_dim = static_cast<int>(shape.back())};
  const CombineAccess access =
      has_vector_columns(parts) && has_vector_columns(out) ? CombineAccess::kVector : CombineAccess::kScalar;
  const cudaError_t error = launch_combine(params, access, current_stream(out_partial));
  check_cuda(error, "launching flash_attn_combine");
  return {returned_dtype == written_dtype ? out : torch::stable::to(out, returned_dtype), lse};
}

}  // namespace flash_attn

#include <algorithm>
#include <limits>

#include "kernels/common/start_kernel.h"
#include "kernels/misc/combine.h"
#include "kernels/misc/combine_row.h"
#include "variant/rounding.h"

namespace flash_attn {
namespace {

constexpr int kNumThreads = 128;
using Lanes = RowLanes<32>;
constexpr int kRowsPerBlock = kNumThreads / Lanes::kCount;

struct RowCoord {
  int64_t batch_idx;
  int64_t row;
  int64_t head_idx;
};

template <class Element>
__device__ Element* row_of(const Operand& operand, const RowCoord& at) {
  return static_cast<Element*>(operand.ptr) + at.batch_idx * operand.batch_stride + at.row * operand.row_stride +
         at.head_idx * operand.head_stride;
}

// One warp per row.
template <class Part, class Out, int kColumns>
__global__ void __launch_bounds__(kNumThreads) combine_kernel(const __grid_constant__ CombineParams params) {
  const int64_t num_rows = params.batch * params.num_rows * params.num_heads;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + threadIdx.x / Lanes::kCount;
  for (int64_t idx = first; idx < num_rows; idx += static_cast<int64_t>(gridDim.x) * kRowsPerBlock) {
    const int64_t run = idx / params.num_heads;
    const RowCoord at{run / params.num_rows, run % params.num_rows, idx % params.num_heads};
    const RowParts<Part> parts{row_of<Part>(params.part_out, at), params.part_out_stride,
                               row_of<float>(params.part_lse, at), params.part_lse_stride, params.num_parts};
    const float lse = combined_lse<Lanes>(parts);
    if (Lanes::idx() == 0) *row_of<float>(params.lse, at) = lse;
    Out* const out = row_of<Out>(params.out, at);
    for (int column = 0; column < params.head_dim; column += Lanes::kCount * kColumns) {
      combined_columns<Lanes, 1, kColumns>(parts, lse, column, params.head_dim).store(out, column, params.head_dim);
    }
  }
}

template <class Call>
void with_element(CombineDtype dtype, const Call& call) {
  switch (dtype) {
    case CombineDtype::kFp16:
      return call(__half{});
    case CombineDtype::kBf16:
      return call(__nv_bfloat16{});
    case CombineDtype::kFp32:
      return call(float{});
  }
}

}  // namespace

cudaError_t launch_combine(const CombineParams& params, CombineAccess access, cudaStream_t stream) {
  const int64_t num_rows = params.batch * params.num_rows * params.num_heads;
  if (num_rows == 0) return cudaSuccess;
  constexpr int64_t kMaxBlocks = std::numeric_limits<int32_t>::max();
  const auto num_blocks = static_cast<int>(std::min(ceil_div(num_rows, kRowsPerBlock), kMaxBlocks));
  with_element(params.part_dtype, [&](auto part) {
    with_element(params.out_dtype, [&](auto out) {
      using Part = decltype(part);
      using Out = decltype(out);
      const auto kernel = access == CombineAccess::kVector ? &combine_kernel<Part, Out, kCombineColumns>
                                                           : &combine_kernel<Part, Out, 1>;
      start_kernel(kernel, {num_blocks, kNumThreads, 0, stream}, params);
    });
  });
  return cudaGetLastError();
}

}  // namespace flash_attn

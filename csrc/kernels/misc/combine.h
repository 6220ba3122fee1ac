// Merges attention results over disjoint sets of keys: one launch for all rows.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace flash_attn {

enum class CombineDtype { kFp16, kBf16, kFp32 };

// A (batch, row, head) tensor, of head_dim contiguous columns each or, for an LSE, of one. Strides are in elements.
struct RowOperand {
  void* ptr;
  int64_t batch_stride;
  int64_t row_stride;
  int64_t head_stride;
};

struct CombineParams {
  RowOperand part_out;
  int64_t part_out_stride;  // from one part to the next
  CombineDtype part_dtype;
  RowOperand part_lse;  // float32
  int64_t part_lse_stride;
  RowOperand out;
  CombineDtype out_dtype;
  RowOperand lse;  // float32
  int num_parts;
  int64_t batch;
  int64_t num_rows;
  int64_t num_heads;
  int head_dim;
};

// Columns that `part_out` and `out` are read and written in pieces of, where strides, sizes and addresses allow.
inline constexpr int kCombineColumns = 4;

enum class CombineAccess { kVector, kScalar };

cudaError_t launch_combine(const CombineParams& params, CombineAccess access, cudaStream_t stream);

}  // namespace flash_attn

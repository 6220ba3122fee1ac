// Merges attention results over disjoint sets of keys: one launch for all rows.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/common/params.h"

namespace flash_attn {

enum class CombineDtype { kFp16, kBf16, kFp32 };

// An LSE is an operand whose rows have one column.
struct CombineParams {
  Operand part_out;
  int64_t part_out_stride;  // from one part to the next
  CombineDtype part_dtype;
  Operand part_lse;  // float32
  int64_t part_lse_stride;
  Operand out;
  CombineDtype out_dtype;
  Operand lse;  // float32
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

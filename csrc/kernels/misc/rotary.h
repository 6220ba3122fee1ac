// The rotary embedding of queries, out of place.
#pragma once

#include <cuda_runtime.h>

#include "kernels/misc/rotation.h"
#include "kernels/misc/tokens.h"
#include "variant/variant.h"

namespace flash_attn {

// Whether an entry's tokens are at successive positions or all at the first.
enum class RotaryPositions { kSuccessive, kSame };

struct RotateParams {
  TokenLayout tokens;
  TokenOperand x;
  TokenOperand out;
  RotaryParams rotary;
  const int* offsets;  // position of each entry's first token
  RotaryPositions positions;
  int num_heads;
  int head_dim;
};

cudaError_t launch_rotary(const RotateParams& params, Dtype dtype, TokenAccess access, cudaStream_t stream);

}  // namespace flash_attn

// S_dmask of return_attn_probs: the softmax's probabilities, negative where dropout drops them. For tests: the result
// has the size that attention avoids, so its kernel is simple, not fast.
#pragma once

#include <cuda_runtime.h>

#include "kernels/common/params.h"
#include "variant/variant.h"

namespace flash_attn {

// Rows and columns of each (batch, head) are rounded up to a multiple of this.
inline constexpr int kProbsMultiple = 128;

struct AttnProbsParams {
  Operand q;
  Operand k;
  LseOperand lse;
  HeadParams heads;
  SeqParams seq;
  PageParams page;
  WindowParams window;
  ScoreParams score;
  DropoutParams dropout;
  void* probs;  // (batch, head, row, column), contiguous, in q's dtype
  int num_rows;
  int num_columns;
};

cudaError_t launch_attn_probs(const AttnProbsParams& params, Dtype dtype, cudaStream_t stream);

}  // namespace flash_attn

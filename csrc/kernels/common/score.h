// What happens to a score between Q K' and the softmax, but for the mask.
#pragma once

#include <cute/tensor.hpp>

#include "kernels/common/params.h"

namespace flash_attn {

using namespace cute;

// The softmax takes its maximum before it scales, which only a positive scale allows. A scale that isn't positive is
// multiplied in here, and the softmax's is 1.
template <class Scores>
__device__ void apply_score(Scores&& scores, const ScoreParams& params) {
  if (params.factor == 1.f) return;
  CUTE_UNROLL
  for (int i = 0; i < size(scores); ++i) scores(i) *= params.factor;
}

}  // namespace flash_attn

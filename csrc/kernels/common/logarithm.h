// LSE is a natural logarithm; exponentials are computed as powers of 2, as the hardware has them.
#pragma once

#include "kernels/common/instructions.h"

namespace flash_attn {

inline constexpr float kLog2E = 1.4426950408889634f;
inline constexpr float kLn2 = 0.6931471805599453f;

// log(exp(a) + exp(b)), NaN if either is
__device__ inline float log_add_exp(float a, float b) {
  const float high = max_or_nan(a, b);
  return high == -INFINITY ? high : high + log1pf(expf(fminf(a, b) - high));
}

}  // namespace flash_attn

// The type of a kernel's elements.
#pragma once

#include <cutlass/bfloat16.h>
#include <cutlass/half.h>

#include <type_traits>

#include "variant/variant.h"

namespace flash_attn {

template <Dtype kDtype>
using ElementOf = std::conditional_t<kDtype == Dtype::kFp16, cutlass::half_t, cutlass::bfloat16_t>;

}  // namespace flash_attn

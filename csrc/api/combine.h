// The op behind flash_attn_combine.
#pragma once

#include <optional>
#include <tuple>

#include "api/tensors.h"

namespace flash_attn {

// flash_attn._ops has the same text for the CPU path; a test compares them.
#define FLASH_ATTN_COMBINE_SCHEMA \
  "(Tensor out_partial, Tensor lse_partial, ScalarType? out_dtype) -> (Tensor out, Tensor lse)"

// (out, lse) of the parts along dimension 0. A part with an LSE of -inf may hold anything.
std::tuple<Tensor, Tensor> combine(const Tensor& out_partial, const Tensor& lse_partial,
                                   std::optional<ScalarType> out_dtype);

}  // namespace flash_attn

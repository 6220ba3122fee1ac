// Rounds what a lane holds of a tile.
#pragma once

#include <cutlass/numeric_conversion.h>

#include "kernels/common/tensor.h"

namespace flash_attn {

using namespace cute;

template <class Element, class Tensor>
CUTE_DEVICE auto convert_to(const Tensor& source) {
  auto result = make_tensor<Element>(shape(source));
  cutlass::NumericArrayConverter<Element, typename Tensor::value_type, decltype(size(source))::value> convert;
  auto& from = *reinterpret_cast<const cutlass::Array<typename Tensor::value_type, decltype(size(source))::value>*>(
      source.data());
  auto& to = *reinterpret_cast<cutlass::Array<Element, decltype(size(source))::value>*>(result.data());
  to = convert(from);
  return result;
}

}  // namespace flash_attn

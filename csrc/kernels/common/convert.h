// Rounds what a lane holds of a tile.
#pragma once

#include <cutlass/numeric_conversion.h>

#include "kernels/common/tensor.h"

namespace flash_attn {

using namespace cute;

// Into registers that hold as many elements, in the same order.
template <class Target, class Source>
CUTE_DEVICE void round_to(Target& target, const Source& source) {
  constexpr int kSize = decltype(size(source))::value;
  using From = typename Source::value_type;
  using To = typename Target::value_type;
  static_assert(decltype(size(target))::value == kSize);
  *reinterpret_cast<cutlass::Array<To, kSize>*>(target.data()) = cutlass::NumericArrayConverter<To, From, kSize>{}(
      *reinterpret_cast<const cutlass::Array<From, kSize>*>(source.data()));
}

template <class Element, class Source>
CUTE_DEVICE auto convert_to(const Source& source) {
  auto result = make_tensor<Element>(shape(source));
  round_to(result, source);
  return result;
}

}  // namespace flash_attn

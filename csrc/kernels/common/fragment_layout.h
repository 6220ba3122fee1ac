// Register layouts of mma.m16n8k16, seen as the algorithm needs them.
#pragma once

#include <cutlass/numeric_conversion.h>

#include <cute/tensor.hpp>

namespace flash_attn {

using namespace cute;

// Accumulator ((2, 2), MMA_M, MMA_N) -> (rows, columns): a lane holds two rows of each 16 x 8 atom, two columns of
// each.
template <class Layout>
CUTE_HOST_DEVICE constexpr auto as_rows_and_columns(Layout layout) {
  static_assert(decltype(rank(layout))::value == 3);
  const auto atom = logical_divide(get<0>(layout), Int<2>{});  // (column pair, row pair)
  return make_layout(make_layout(get<1>(atom), get<1>(layout)), make_layout(get<0>(atom), get<2>(layout)));
}

// The (row, column) within a tile of each element that thread `thread_idx` of a product holds of its accumulator.
template <class Mma, int kRows, int kCols>
CUTE_DEVICE auto accumulator_coords(int thread_idx) {
  const Tensor coords = Mma{}.get_slice(thread_idx).partition_C(make_identity_tensor(Shape<Int<kRows>, Int<kCols>>{}));
  return make_tensor(coords.data(), as_rows_and_columns(coords.layout()));
}

// Accumulator (4, MMA_M, MMA_N) -> A operand ((4, 2), MMA_M, MMA_N / 2): two 16 x 8 accumulator atoms side by side hold
// exactly what a lane owns of one 16 x 16 operand.
template <class Layout>
CUTE_HOST_DEVICE constexpr auto as_a_operand(Layout layout) {
  static_assert(decltype(rank(layout))::value == 3);
  const auto pairs = logical_divide(get<2>(layout), Int<2>{});  // (2, MMA_N / 2)
  return make_layout(make_layout(get<0>(layout), get<0>(pairs)), get<1>(layout), get<1>(pairs));
}

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

// Rotary position embedding (Su et al.: RoFormer; arXiv:2104.09864) of a token's columns.
#pragma once

#include <cstdint>

#if defined(__CUDACC__) || defined(FLASH_ATTN_EMULATED)
#include "kernels/misc/elements.h"
#include "kernels/misc/tokens.h"
#endif

namespace flash_attn {

// Which columns are rotated together: (0, 1), (2, 3), ... or (0, half_dim), (1, half_dim + 1), ...
enum class RotaryPairs { kNeighbours, kHalves };

// Tables of (position, pair) in the tokens' dtype, pairs contiguous. Columns from 2 * half_dim on stay as they are.
struct RotaryParams {
  const void* cos;
  const void* sin;
  int64_t cos_stride;
  int64_t sin_stride;
  int64_t num_positions;
  int half_dim;  // 0: nothing is rotated
  RotaryPairs pairs;
};

#if defined(__CUDACC__) || defined(FLASH_ATTN_EMULATED)

__device__ inline bool has_position(const RotaryParams& rotary, int64_t position) {
  return position >= 0 && position < rotary.num_positions;
}

// Columns [column, column + kColumns) of a row, rotated at a position that the tables have. Each product and the sum
// are rounded to float32, as the CPU path does, so that both give the same bits.
template <int kColumns, class Element>
__device__ ElementVector<Element, kColumns> rotated(const TokenRow<Element>& row, int column,
                                                    const RotaryParams& rotary, int64_t position) {
  const auto own = load_vector<kColumns>(row.at(column));
  if (column >= 2 * rotary.half_dim) return own;
  const bool halves = rotary.pairs == RotaryPairs::kHalves;
  const bool in_first_half = column < rotary.half_dim;
  ElementVector<Element, kColumns> partner;
  if (halves) {
    partner = load_vector<kColumns>(row.at(in_first_half ? column + rotary.half_dim : column - rotary.half_dim));
  } else if constexpr (kColumns > 1) {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) partner.at[i] = own.at[i ^ 1];
  } else {
    partner = load_vector<kColumns>(row.at(column ^ 1));
  }
  const Element* const cos = static_cast<const Element*>(rotary.cos) + position * rotary.cos_stride;
  const Element* const sin = static_cast<const Element*>(rotary.sin) + position * rotary.sin_stride;
  ElementVector<Element, kColumns> result;
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    const int c = column + i;
    const bool is_first = halves ? in_first_half : c % 2 == 0;
    const int pair = halves ? (in_first_half ? c : c - rotary.half_dim) : c / 2;
    const float along = __fmul_rn(to_float(own.at[i]), to_float(cos[pair]));
    const float across = __fmul_rn(to_float(partner.at[i]), to_float(sin[pair]));
    result.at[i] = from_float<Element>(is_first ? __fsub_rn(along, across) : __fadd_rn(across, along));
  }
  return result;
}

#endif

}  // namespace flash_attn

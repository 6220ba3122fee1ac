// Removes the scores of keys that a row may not see.
#pragma once

#include "kernels/common/kv_range.h"
#include "kernels/common/tensor.h"

namespace flash_attn {

using namespace cute;

// `coords` holds the (row, column) within the tile of each score, both in (rows, columns) view. Columns are counted
// from the lane's first one, so that they are compile-time constants.
template <class Scores, class Coords, class Keys>
__device__ void apply_mask(Scores&& scores, const Coords& coords, const Keys& keys, int m_begin, int n_begin) {
  const int first_key = n_begin + static_cast<int>(get<1>(coords(0, 0)));
  CUTE_UNROLL
  for (int row = 0; row < size<0>(scores); ++row) {
    const int row_idx = m_begin + static_cast<int>(get<0>(coords(row, 0)));
    const int begin = keys.begin(row_idx) - first_key;
    const int end = keys.end(row_idx) - first_key;
    CUTE_UNROLL
    for (int col = 0; col < size<1>(scores); ++col) {
      const int column = static_cast<int>(get<1>(coords.layout()(0, col)));
      if (column >= end || (Keys::kHasBegin && column < begin)) scores(row, col) = -INFINITY;
    }
  }
}

}  // namespace flash_attn

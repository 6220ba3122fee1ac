// Removes the scores of keys that a row may not see.
#pragma once

#include <cute/tensor.hpp>

#include "kernels/common/seq_info.h"
#include "variant/variant.h"

namespace flash_attn {

using namespace cute;

// `coords` holds the (row, column) within the tile of each score, both in (rows, columns) view.
template <Mask kMask, class Scores, class Coords>
__device__ void apply_mask(Scores&& scores, const Coords& coords, const SeqInfo& seq, int m_begin, int n_begin) {
  CUTE_UNROLL
  for (int row = 0; row < size<0>(scores); ++row) {
    int last_visible = seq.seqlen_k - 1;
    if constexpr (kMask == Mask::kCausal) {
      last_visible = min(last_visible, m_begin + static_cast<int>(get<0>(coords(row, 0))) + seq.diagonal());
    }
    CUTE_UNROLL
    for (int col = 0; col < size<1>(scores); ++col) {
      if (n_begin + static_cast<int>(get<1>(coords(row, col))) > last_visible) scores(row, col) = -INFINITY;
    }
  }
}

}  // namespace flash_attn

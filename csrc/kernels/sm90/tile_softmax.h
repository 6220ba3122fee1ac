// The softmax of a warpgroup's scores, and what O is multiplied by for it, as the tile's row says.
#pragma once

#include "kernels/common/row_reducer.h"
#include "kernels/common/tensor.h"

namespace flash_attn::sm90 {

using namespace cute;

template <class Traits, class Softmax, class Scores>
CUTE_DEVICE auto exponentiate_scores(Softmax& softmax, Scores& scores) {
  return softmax.template exponentiate<Traits::kTile.polynomial_exps, Traits::kTile.rescale_slack>(scores,
                                                                                                   QuadReducer{});
}

template <class Traits, class Softmax, class Output, class Factors>
CUTE_DEVICE void rescale_output(Output& output, const Factors& factors) {
  if constexpr (Traits::kTile.rescale_slack > 0) {
    Softmax::rescale_if_needed(output, factors);
  } else {
    Softmax::rescale(output, factors);
  }
}

}  // namespace flash_attn::sm90

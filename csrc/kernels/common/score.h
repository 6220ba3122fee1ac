// What happens to a score between Q K' and the softmax, but for the mask: scale, softcap, ALiBi, in that order.
#pragma once

#include <cute/tensor.hpp>

#include "kernels/common/params.h"
#include "kernels/common/seq_info.h"
#include "variant/variant.h"

namespace flash_attn {

using namespace cute;

namespace detail {

// 1 - 2 / (e^2x + 1): its absolute error is a few roundings of 1, where tanh.approx has 2^-11.
__device__ inline float fast_tanh(float x) { return 1.f - __fdividef(2.f, __expf(2.f * x) + 1.f); }

}  // namespace detail

// The scores of one tile still have to be multiplied by params.score.softmax_scale, which the softmax does. It takes
// its maximum before it scales, which only a positive scale allows: another one is multiplied in here, and the
// softmax's is 1.
template <Score kScore, class Scores, class Coords>
__device__ void apply_score(Scores&& scores, const Coords& coords, const ForwardParams& params, const TileCoord& tile,
                            int n_begin) {
  const ScoreParams& score = params.score;
  if (score.factor != 1.f) {
    CUTE_UNROLL
    for (int i = 0; i < size(scores); ++i) scores(i) *= score.factor;
  }
  if constexpr (kScore == Score::kGeneral) {
    if (score.has_softcap) {
      CUTE_UNROLL
      for (int i = 0; i < size(scores); ++i) scores(i) = detail::fast_tanh(scores(i));
    }
    if (score.alibi_slopes != nullptr) {
      const float slope = score.alibi_slopes[tile.seq.batch_idx * score.alibi_batch_stride + tile.head_idx];
      const float bias = -slope / score.softmax_scale;
      CUTE_UNROLL
      for (int row = 0; row < size<0>(scores); ++row) {
        const int diagonal = tile.m_begin + static_cast<int>(get<0>(coords(row, 0))) + tile.seq.diagonal() - n_begin;
        CUTE_UNROLL
        for (int col = 0; col < size<1>(scores); ++col) {
          scores(row, col) += bias * static_cast<float>(abs(diagonal - static_cast<int>(get<1>(coords(row, col)))));
        }
      }
    }
  }
}

}  // namespace flash_attn

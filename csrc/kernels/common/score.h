// What happens to a score between Q K' and the softmax, but for the mask: scale, softcap, ALiBi, in that order.
#pragma once

#include "kernels/common/instructions.h"
#include "kernels/common/logarithm.h"
#include "kernels/common/params.h"
#include "kernels/common/seq_info.h"
#include "kernels/common/tensor.h"
#include "variant/variant.h"

namespace flash_attn {

using namespace cute;

namespace detail {

// 1 - 2 / (e^2x + 1): its absolute error is a few roundings of 1, where tanh.approx has 2^-11. __expf and __fdividef
// would also handle subnormal numbers, with twice as many instructions.
__device__ inline float fast_tanh(float x) {
  return fmaf(-2.f, fast_reciprocal(fast_exp2(2.f * kLog2E * x) + 1.f), 1.f);
}

}  // namespace detail

// The softmax multiplies by softmax_scale itself, after it has taken the row maximum: only a positive scale allows
// that. Any other one is `score_factor`, and softmax_scale is then 1.
template <class Scores>
__device__ void apply_score_factor(Scores&& scores, const ScoreParams& score) {
  if (score.score_factor == 1.f) return;
  CUTE_UNROLL
  for (int i = 0; i < size(scores); ++i) scores(i) *= score.score_factor;
}

template <class Scores>
__device__ void apply_softcap(Scores&& scores, const ScoreParams& score) {
  if (!score.has_softcap) return;
  CUTE_UNROLL
  for (int i = 0; i < size(scores); ++i) scores(i) = detail::fast_tanh(scores(i));
}

// `coords` holds the (row, column) within the tile of each score, both in (rows, columns) view; the tile begins at row
// m_begin and key n_begin of its entry.
template <class Scores, class Coords, class RowMap>
__device__ void apply_alibi(Scores&& scores, const Coords& coords, const ScoreParams& score, const SeqInfo& seq,
                            const RowMap& rows, int m_begin, int n_begin) {
  if (score.alibi_slopes == nullptr) return;
  const float* slopes = score.alibi_slopes + seq.batch_idx * score.alibi_batch_stride;
  const int first_key = n_begin + static_cast<int>(get<1>(coords(0, 0)));
  CUTE_UNROLL
  for (int row = 0; row < size<0>(scores); ++row) {
    const int row_idx = m_begin + static_cast<int>(get<0>(coords(row, 0)));
    const float bias = -slopes[rows.head(row_idx)] / score.softmax_scale;
    const int diagonal = rows.query(row_idx) + seq.diagonal() - first_key;
    CUTE_UNROLL
    for (int col = 0; col < size<1>(scores); ++col) {
      scores(row, col) += bias * static_cast<float>(abs(diagonal - static_cast<int>(get<1>(coords.layout()(0, col)))));
    }
  }
}

template <Score kScore, class Scores, class Coords, class RowMap>
__device__ void apply_score(Scores&& scores, const Coords& coords, const ScoreParams& score, const SeqInfo& seq,
                            const RowMap& rows, int m_begin, int n_begin) {
  apply_score_factor(scores, score);
  if constexpr (kScore == Score::kGeneral) {
    apply_softcap(scores, score);
    apply_alibi(scores, coords, score, seq, rows, m_begin, n_begin);
  }
}

}  // namespace flash_attn

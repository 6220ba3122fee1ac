// From scores and dP to P and dS, in registers.
#pragma once

#include "kernels/common/backward_params.h"
#include "kernels/common/instructions.h"
#include "kernels/common/kv_range.h"
#include "kernels/common/logarithm.h"
#include "kernels/common/mask.h"
#include "kernels/common/row_map.h"
#include "kernels/common/score.h"
#include "kernels/common/tensor.h"
#include "kernels/sm80/dropout.h"

namespace flash_attn::sm80 {

using namespace cute;

// One tile of scores: its place, and the rows' statistics as this lane needs them.
template <int kNumRows>
struct ScoreTile {
  int head_idx;
  int m_begin;
  int n_begin;
  bool needs_mask;
  float lse_log2[kNumRows];
  float delta[kNumRows];

  // Rows past those in use get P = 0.
  template <class Coords>
  __device__ void load_rows(const RowStatistics& rows, const SeqInfo& seq, const Coords& coords) {
    const int64_t first = seq.batch_idx * rows.batch_stride + seq.row_begin_q + head_idx * rows.head_stride + m_begin;
    CUTE_UNROLL
    for (int i = 0; i < kNumRows; ++i) {
      const int row = get<0>(coords(i, 0));
      const bool in_use = m_begin + row < seq.seqlen_q;
      lse_log2[i] = in_use ? rows.lse_log2[first + row] : INFINITY;
      delta[i] = in_use ? rows.delta[first + row] : 0.f;
    }
  }
};

// Drops what the forward dropped, of P and of dP. What is left of P is scaled with dV, once.
template <int kPairs, class Probs, class Grads, class Coords, int kNumRows>
__device__ void apply_dropout(Probs&& probs, Grads&& grads, const Coords& coords, const BackwardParams& params,
                              const SeqInfo& seq, const ScoreTile<kNumRows>& tile) {
  const DropoutMask mask(params.dropout, params.heads.num_heads, seq.batch_idx, tile.head_idx);
  mask.template apply<kPairs>(probs, coords, tile.m_begin, tile.n_begin);
  CUTE_UNROLL
  for (int i = 0; i < size(probs); ++i) grads(i) = probs(i) == 0.f ? 0.f : grads(i) * params.dropout.rescale;
}

// dS = P * (dP - delta), the softmax's gradient, from scores and dP; both in place, all (rows, columns) views. What
// goes into dV is P with dropout.
template <class Traits, class Scores, class Grads, class Coords, int kNumRows>
__device__ void softmax_backward(Scores&& scores, Grads&& grads, const Coords& coords, const BackwardParams& params,
                                 const VisibleKeys<Mask::kGeneral>& keys, const ScoreTile<kNumRows>& tile) {
  constexpr bool kGeneral = Traits::kScore == Score::kGeneral;
  const SeqInfo& seq = keys.seq;
  apply_score_factor(scores, params.score);
  auto slope = make_tensor<float>(shape(scores));  // of the softcap
  if constexpr (kGeneral) {
    apply_softcap(scores, params.score);
    CUTE_UNROLL
    for (int i = 0; i < size(scores); ++i) slope(i) = params.score.has_softcap ? 1.f - scores(i) * scores(i) : 1.f;
    apply_alibi(scores, coords, params.score, seq, HeadRows{tile.head_idx}, tile.m_begin, tile.n_begin);
  }
  if (tile.needs_mask) apply_mask(scores, coords, keys, tile.m_begin, tile.n_begin);

  const float scale_log2 = params.score.softmax_scale * kLog2E;
  CUTE_UNROLL
  for (int row = 0; row < kNumRows; ++row) {
    CUTE_UNROLL
    for (int col = 0; col < size<1>(scores); ++col) {
      scores(row, col) = fast_exp2(fmaf(scores(row, col), scale_log2, -tile.lse_log2[row]));
      if constexpr (kGeneral) slope(row, col) *= scores(row, col);
    }
  }
  if constexpr (kGeneral) {
    if (params.dropout.rng_state != nullptr) {
      apply_dropout<dropout_pairs(Traits::kScoreWarpsN)>(scores, grads, coords, params, seq, tile);
    }
  }
  CUTE_UNROLL
  for (int row = 0; row < kNumRows; ++row) {
    CUTE_UNROLL
    for (int col = 0; col < size<1>(scores); ++col) {
      const float probability = kGeneral ? slope(row, col) : scores(row, col);
      grads(row, col) = probability * (grads(row, col) - tile.delta[row]);
    }
  }
}

}  // namespace flash_attn::sm80

// Softmax over tiles of keys as they come: one running maximum and sum per row (Milakov and Gimelshein, 2018).
#pragma once

#include "kernels/common/instructions.h"
#include "kernels/common/logarithm.h"
#include "kernels/common/tensor.h"

namespace flash_attn {

using namespace cute;

namespace detail {

// 2^x for x <= 0 on the FMA units, which have time where the special-function unit of fast_exp2 has none: 2^n 2^f, n
// the nearest integer, 2^f by a cubic with relative error 1.01e-4 that is exact at 0, so that 2^-127 and less becomes
// 0.
__device__ inline float polynomial_exp2(float x) {
  constexpr float kRound = 12582912.f;  // 1.5 * 2^23: a sum with it is rounded to an integer
  constexpr int kMantissaBits = 23;
  const float clamped = max_or_nan(x, -127.f);
  const float shifted = clamped + kRound;
  const float f = clamped - (shifted - kRound);
  const float cubic = fmaf(fmaf(fmaf(0.05500893f, f, 0.242211f), f, 0.69328293f), f, 1.f);
  return __int_as_float(__float_as_int(cubic) + (__float_as_int(shifted) << kMantissaBits));
}

}  // namespace detail

template <int kNumRows>  // rows that a lane holds a part of
class OnlineSoftmax {
 public:
  using RowTensor = decltype(make_tensor<float>(Shape<Int<kNumRows>>{}));

  __device__ explicit OnlineSoftmax(float softmax_scale) : scale_log2_(softmax_scale * kLog2E) {
    fill(row_max_, -INFINITY);
    clear(row_sum_);
  }

  // Turns scores into exp(score - maximum), in place, and rescales the output accumulated so far to the new maximum.
  template <class Scores, class Output, class Reducer>  // (rows, columns) views of accumulators
  __device__ void update(Scores&& scores, Output&& output, const Reducer& reducer) {
    RowTensor new_max;
    CUTE_UNROLL
    for (int row = 0; row < kNumRows; ++row) {
      new_max(row) = row_max_(row);
      CUTE_UNROLL
      for (int col = 0; col < size<1>(scores); ++col) new_max(row) = fmaxf(new_max(row), scores(row, col));
    }
    reducer.max(new_max);
    CUTE_UNROLL
    for (int row = 0; row < kNumRows; ++row) {
      const float max_log2 = finite(new_max(row)) * scale_log2_;
      const float rescale = fast_exp2(rescale_exponent(row, max_log2));
      row_max_(row) = new_max(row);
      row_sum_(row) *= rescale;
      CUTE_UNROLL
      for (int col = 0; col < size<1>(output); ++col) output(row, col) *= rescale;
      CUTE_UNROLL
      for (int col = 0; col < size<1>(scores); ++col) {
        scores(row, col) = fast_exp2(fmaf(scores(row, col), scale_log2_, -max_log2));
        row_sum_(row) += scores(row, col);
      }
    }
  }

  // As update(), for an output that matrix products still write: returns the factor that each of its rows must be
  // multiplied by. Maxima and sums are taken along several chains, since one warp alone must keep its scheduler busy.
  // Of 16 exponentials, kNumPolynomials are computed by polynomial_exp2. A row keeps the maximum that it is scaled to,
  // with a factor of exactly 1, until a new one exceeds it by more than kSlack powers of two: 16-bit probabilities have
  // room for that.
  template <int kNumPolynomials, int kSlack, class Scores, class Reducer>
  __device__ RowTensor exponentiate(Scores&& scores, const Reducer& reducer) {
    constexpr int kNumChains = 4;
    RowTensor new_max;
    CUTE_UNROLL
    for (int row = 0; row < kNumRows; ++row) {
      float chains[kNumChains];
      CUTE_UNROLL
      for (int col = 0; col < size<1>(scores); ++col) {
        float& chain = chains[col % kNumChains];
        chain = col < kNumChains ? scores(row, col) : fmaxf(chain, scores(row, col));
      }
      new_max(row) = fmaxf(row_max_(row), fmaxf(fmaxf(chains[0], chains[1]), fmaxf(chains[2], chains[3])));
    }
    reducer.max(new_max);
    RowTensor factors;
    CUTE_UNROLL
    for (int row = 0; row < kNumRows; ++row) {
      const bool stays = kSlack > 0 && (new_max(row) - row_max_(row)) * scale_log2_ <= kSlack;
      if (stays) new_max(row) = row_max_(row);
      const float max_log2 = finite(new_max(row)) * scale_log2_;
      factors(row) = stays ? 1.f : fast_exp2(rescale_exponent(row, max_log2));
      row_max_(row) = new_max(row);
      float chains[kNumChains];
      CUTE_UNROLL
      for (int col = 0; col < size<1>(scores); ++col) {
        const float exponent = fmaf(scores(row, col), scale_log2_, -max_log2);
        const bool polynomial = col * kNumPolynomials % 16 < kNumPolynomials;
        scores(row, col) = polynomial ? detail::polynomial_exp2(exponent) : fast_exp2(exponent);
        float& chain = chains[col % kNumChains];
        chain = col < kNumChains ? scores(row, col) : chain + scores(row, col);
      }
      row_sum_(row) = row_sum_(row) * factors(row) + ((chains[0] + chains[1]) + (chains[2] + chains[3]));
    }
    return factors;
  }

  template <class Output, class Factors>
  static __device__ void rescale(Output&& output, const Factors& factors) {
    CUTE_UNROLL
    for (int row = 0; row < kNumRows; ++row) {
      CUTE_UNROLL
      for (int col = 0; col < size<1>(output); ++col) output(row, col) *= factors(row);
    }
  }

  // The same, skipped where all factors of the warp are 1.
  template <class Output, class Factors>
  static __device__ void rescale_if_needed(Output&& output, const Factors& factors) {
    bool needed = false;
    CUTE_UNROLL
    for (int row = 0; row < kNumRows; ++row) needed |= factors(row) != 1.f;
    if (__any_sync(~0u, needed)) rescale(output, factors);
  }

  // Divides the output by the row sums, which the sinks join, and returns the log-sum-exp. A row that saw no key gets O
  // = 0 and LSE = -inf, or the sink's score; NaN among what it saw stays NaN. `output_scale` undoes what dropout took
  // away.
  template <class Output, class Reducer>
  __device__ RowTensor finish(Output&& output, const Reducer& reducer, const RowTensor& sinks, float output_scale) {
    reducer.sum(row_sum_);
    RowTensor lse;
    CUTE_UNROLL
    for (int row = 0; row < kNumRows; ++row) {
      const float sum = row_sum_(row);
      const float lse_of_keys = sum == 0.f ? -INFINITY : row_max_(row) * (scale_log2_ * kLn2) + logf(sum);
      lse(row) = log_add_exp(lse_of_keys, sinks(row));
      const float factor = sum == 0.f ? 0.f : expf(lse_of_keys - lse(row)) / sum * output_scale;
      CUTE_UNROLL
      for (int col = 0; col < size<1>(output); ++col) output(row, col) *= factor;
    }
    return lse;
  }

  // The same sink for all rows.
  template <class Output, class Reducer>
  __device__ RowTensor finish(Output&& output, const Reducer& reducer, float sink, float output_scale) {
    RowTensor sinks;
    fill(sinks, sink);
    return finish(output, reducer, sinks, output_scale);
  }

 private:
  // The factor from the old maximum to the new one is 2 to this power. Both maxima are rounded alike, so that it is 0
  // where the maximum stays: a fused multiply-add would leave a rounding error, of the same sign in each step, and the
  // first keys would lose 1e-3 in 1000 steps.
  __device__ float rescale_exponent(int row, float max_log2) const {
    return __fsub_rn(__fmul_rn(row_max_(row), scale_log2_), max_log2);
  }
  // A row without a visible key so far has maximum -inf; subtracting it would make NaN.
  static __device__ float finite(float maximum) { return maximum == -INFINITY ? 0.f : maximum; }

  RowTensor row_max_;
  RowTensor row_sum_;  // of this lane's columns; the lanes' sums meet in finish()
  float scale_log2_;
};

}  // namespace flash_attn

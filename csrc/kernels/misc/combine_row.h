// Merges what splits of the keys computed for one row.
#pragma once

#include "kernels/common/logarithm.h"
#include "kernels/misc/elements.h"

namespace flash_attn {

// The parts of one row: part s has its columns at `out + s * out_stride`, its log-sum-exp at `lse + s * lse_stride`.
template <class Element>
struct RowParts {
  const Element* out;
  int64_t out_stride;
  const float* lse;
  int64_t lse_stride;
  int count;
};

namespace detail {

inline constexpr int kLanesOfRow = 32;

template <class Combine>
__device__ float reduce_over_lanes(float value, Combine combine) {
#pragma unroll
  for (int distance = kLanesOfRow / 2; distance > 0; distance /= 2) {
    value = combine(value, __shfl_xor_sync(0xffffffff, value, distance));
  }
  return value;
}

}  // namespace detail

// log(sum_s exp(lse_s)), in every lane of the warp that calls it; -inf without a part that saw a key.
template <class Element>
__device__ float combined_lse(const RowParts<Element>& parts) {
  const int lane = threadIdx.x % detail::kLanesOfRow;
  float max = -INFINITY;
  for (int s = lane; s < parts.count; s += detail::kLanesOfRow) max = fmaxf(max, parts.lse[s * parts.lse_stride]);
  max = detail::reduce_over_lanes(max, [](float a, float b) { return fmaxf(a, b); });
  if (isinf(max)) max = 0.f;  // the sum is then 0 or inf, not NaN
  float sum = 0.f;
  for (int s = lane; s < parts.count; s += detail::kLanesOfRow) sum += expf(parts.lse[s * parts.lse_stride] - max);
  sum = detail::reduce_over_lanes(sum, [](float a, float b) { return a + b; });
  return max + logf(sum);
}

template <int kColumns>
struct FloatColumns {
  float at[kColumns];
};

// sum_s exp(lse_s - lse) * out_s over columns [column, column + kColumns). A part that saw no key may hold anything,
// NaN included.
template <int kColumns, class Element>
__device__ FloatColumns<kColumns> combined_columns(const RowParts<Element>& parts, float lse, int column) {
  FloatColumns<kColumns> sum{};
#pragma unroll 4
  for (int s = 0; s < parts.count; ++s) {
    const float part_lse = parts.lse[s * parts.lse_stride];
    if (part_lse == -INFINITY) continue;
    const float weight = expf(part_lse - lse);
    const auto part = load_vector<kColumns>(parts.out + s * parts.out_stride + column);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) sum.at[i] += weight * to_float(part.at[i]);
  }
  return sum;
}

}  // namespace flash_attn

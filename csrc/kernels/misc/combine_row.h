// Merges what splits of the keys computed for one row.
#pragma once

#include "kernels/common/logarithm.h"
#include "kernels/misc/elements.h"
#include "variant/tiles.h"

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

// The lanes that merge one row: a whole warp, or 16 where rows are short. All of them make the same calls.
template <int kCountValue>
struct RowLanes {
  static constexpr int kCount = kCountValue;
  static_assert(kThreadsPerWarp % kCount == 0);

  static __device__ int idx() { return threadIdx.x % kCount; }
  static __device__ int first_of_warp() { return threadIdx.x % kThreadsPerWarp / kCount * kCount; }
  static __device__ unsigned mask() { return (~0u >> (kThreadsPerWarp - kCount)) << first_of_warp(); }

  template <class Combine>
  static __device__ float reduce(float value, Combine combine) {
#pragma unroll
    for (int distance = kCount / 2; distance > 0; distance /= 2) {
      value = combine(value, __shfl_xor_sync(mask(), value, distance));
    }
    return value;
  }

  static __device__ float show(float value, int from) { return __shfl_sync(mask(), value, first_of_warp() + from); }
};

// log(sum_s exp(lse_s)), in every lane; -inf without a part that saw a key.
template <class Lanes, class Element>
__device__ float combined_lse(const RowParts<Element>& parts) {
  float max = -INFINITY;
  for (int s = Lanes::idx(); s < parts.count; s += Lanes::kCount) max = fmaxf(max, parts.lse[s * parts.lse_stride]);
  max = Lanes::reduce(max, [](float a, float b) { return fmaxf(a, b); });
  if (isinf(max)) max = 0.f;  // the sum is then 0 or inf, not NaN
  float sum = 0.f;
  for (int s = Lanes::idx(); s < parts.count; s += Lanes::kCount) sum += expf(parts.lse[s * parts.lse_stride] - max);
  sum = Lanes::reduce(sum, [](float a, float b) { return a + b; });
  return max + logf(sum);
}

// What a lane has of a row: kPieces pieces of kColumns columns side by side, with those of the other lanes in between.
template <class Lanes, int kPieces, int kColumns>
struct LaneColumns {
  float at[kPieces][kColumns];

  static __device__ int column(int piece) { return (piece * Lanes::kCount + Lanes::idx()) * kColumns; }

  __device__ void add(const LaneColumns& other) {
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
#pragma unroll
      for (int i = 0; i < kColumns; ++i) at[piece][i] += other.at[piece][i];
    }
  }

  // Rounds the columns [first, end) of the row.
  template <class Element>
  __device__ void store(Element* row, int first, int end) const {
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      if (first + column(piece) >= end) continue;
      ElementVector<Element, kColumns> rounded;
#pragma unroll
      for (int i = 0; i < kColumns; ++i) rounded.at[i] = from_float<Element>(at[piece][i]);
      store_vector(row + first + column(piece), rounded);
    }
  }
};

// sum_s exp(lse_s - lse) * out_s over columns [first, end). A part that saw no key may hold anything, NaN included: it
// is not read. A few parts are loaded before the first of them is used, since the compiler would wait for each. Lanes
// past the row's end load its last columns, and store nothing.
template <class Lanes, int kPieces, int kColumns, class Element>
__device__ LaneColumns<Lanes, kPieces, kColumns> combined_columns(const RowParts<Element>& parts, float lse, int first,
                                                                  int end) {
  using Columns = LaneColumns<Lanes, kPieces, kColumns>;
  constexpr int kPartsAtOnce = kPieces < 4 ? 4 / kPieces : 1;
  static_assert(Lanes::kCount % kPartsAtOnce == 0, "a lane has no LSE for what follows the last part");
  Columns sum{};
  for (int begin = 0; begin < parts.count; begin += Lanes::kCount) {
    const int own = begin + Lanes::idx();
    const float own_lse = own < parts.count ? parts.lse[own * parts.lse_stride] : -INFINITY;
    const float own_weight = expf(own_lse - lse);
    const int count = min(Lanes::kCount, parts.count - begin);
    for (int s = 0; s < count; s += kPartsAtOnce) {
      ElementVector<Element, kColumns> loaded[kPartsAtOnce][kPieces]{};
      float weights[kPartsAtOnce];
#pragma unroll
      for (int part = 0; part < kPartsAtOnce; ++part) {
        const bool saw_keys = Lanes::show(own_lse, s + part) != -INFINITY;
        const float weight = Lanes::show(own_weight, s + part);
        weights[part] = saw_keys ? weight : 0.f;
        const Element* out = parts.out + (begin + s + part) * parts.out_stride;
#pragma unroll
        for (int piece = 0; piece < kPieces; ++piece) {
          const int column = min(first + Columns::column(piece), end - kColumns);
          if (saw_keys) loaded[part][piece] = load_vector<kColumns>(out + column);
        }
      }
#pragma unroll
      for (int part = 0; part < kPartsAtOnce; ++part) {
#pragma unroll
        for (int piece = 0; piece < kPieces; ++piece) {
#pragma unroll
          for (int i = 0; i < kColumns; ++i) sum.at[piece][i] += weights[part] * to_float(loaded[part][piece].at[i]);
        }
      }
    }
  }
  return sum;
}

}  // namespace flash_attn

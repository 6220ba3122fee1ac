// Reduces what several lanes hold of a row to one value.
#pragma once

#include "kernels/common/tensor.h"

namespace flash_attn {

using namespace cute;

// Four neighbouring lanes hold a row.
struct QuadReducer {
  template <class Rows>
  __device__ void max(Rows& rows) const {
    CUTE_UNROLL
    for (int i = 0; i < size(rows); ++i) {
      rows(i) = fmaxf(rows(i), __shfl_xor_sync(~0u, rows(i), 1));
      rows(i) = fmaxf(rows(i), __shfl_xor_sync(~0u, rows(i), 2));
    }
  }

  template <class Rows>
  __device__ void sum(Rows& rows) const {
    CUTE_UNROLL
    for (int i = 0; i < size(rows); ++i) {
      rows(i) += __shfl_xor_sync(~0u, rows(i), 1);
      rows(i) += __shfl_xor_sync(~0u, rows(i), 2);
    }
  }
};

// Warps that own different columns hold a row; they meet in shared memory, (kNumWarps, kTileM). A reduction contains
// one barrier of the thread block; the caller has another one before the next reduction.
template <int kNumWarps, int kTileM, class Coords>  // coords: (row, column) within the tile, in (rows, columns) view
class CrossWarpReducer {
 public:
  __device__ CrossWarpReducer(float* exchange, int warp_n_idx, const Coords& coords)
      : exchange_(exchange), warp_n_idx_(warp_n_idx), coords_(coords) {}

  template <class Rows>
  __device__ void max(Rows& rows) const {
    QuadReducer{}.max(rows);
    reduce(rows, [](float a, float b) { return fmaxf(a, b); });
  }

  template <class Rows>
  __device__ void sum(Rows& rows) const {
    QuadReducer{}.sum(rows);
    reduce(rows, [](float a, float b) { return a + b; });
  }

 private:
  template <class Rows, class Combine>
  __device__ void reduce(Rows& rows, Combine combine) const {
    CUTE_UNROLL
    for (int i = 0; i < size(rows); ++i) exchange_[warp_n_idx_ * kTileM + row_of(i)] = rows(i);
    __syncthreads();
    CUTE_UNROLL
    for (int i = 0; i < size(rows); ++i) {
      // Every lane combines in the same order, so that all agree on the result to the last bit.
      rows(i) = exchange_[row_of(i)];
      CUTE_UNROLL
      for (int warp = 1; warp < kNumWarps; ++warp) rows(i) = combine(rows(i), exchange_[warp * kTileM + row_of(i)]);
    }
  }

  __device__ int row_of(int i) const { return get<0>(coords_(i, 0)); }

  float* exchange_;
  int warp_n_idx_;
  Coords coords_;
};

}  // namespace flash_attn

// Brings tiles of rows from global to swizzled shared memory with cp.async. Rows out of bounds and columns past the
// head dim are filled with zeros and not read.
#pragma once

#include <cute/tensor.hpp>

#include "kernels/common/kv_range.h"
#include "kernels/common/params.h"
#include "kernels/sm80/tile_types.h"

namespace flash_attn::sm80 {

using namespace cute;

// First element of one head of one batch entry.
template <class Element>
CUTE_DEVICE Element* head_of(const Operand& operand, int batch_idx, int64_t row_begin, int head_idx) {
  return static_cast<Element*>(operand.ptr) + batch_idx * operand.batch_stride + row_begin * operand.row_stride +
         head_idx * operand.head_stride;
}

// Global tensor of (rows, kCols) over one head of one sequence; `row_begin` may lie anywhere in it.
template <int kRows, int kCols, class Element>
CUTE_DEVICE auto gmem_tile(Element* head, int64_t row_begin, int64_t row_stride) {
  return make_tensor(make_gmem_ptr(head + row_begin * row_stride),
                     make_layout(Shape<Int<kRows>, Int<kCols>>{}, make_stride(row_stride, _1{})));
}

// The rows of a sequence.
class RowsBelow {
 public:
  __device__ RowsBelow(int end) : end_(end) {}
  __device__ bool contains(int row) const { return row < end_; }

 private:
  int end_;
};

// The rows of a sequence that are seen, of which there is one at least.
class RowsBetween {
 public:
  __device__ RowsBetween(const KeySpan& seen) : begin_(seen.begin), count_(seen.end - seen.begin) {}
  __device__ bool contains(int row) const {
    return static_cast<unsigned>(row - begin_) < static_cast<unsigned>(count_);
  }
  __device__ int nearest(int row) const { return min(max(row, begin_), begin_ + count_ - 1); }

 private:
  int begin_;
  int count_;
};

template <class Traits, int kRows, int kCols, class Bounds = RowsBelow>
class TileLoader {
 public:
  using Element = typename Traits::Element;
  using TiledLoad = typename Traits::template Access<kCols>::TiledLoad;

  __device__ TileLoader(const Element* head, int64_t row_stride, const Bounds& bounds, int num_cols)
      : head_(head), row_stride_(row_stride), bounds_(bounds), num_cols_(num_cols) {}

  // Starts the copy of rows [row_begin, row_begin + kRows) to `smem`; the caller fences and waits.
  template <class SmemTensor>
  __device__ void load(int row_begin, SmemTensor&& smem) const {
    const auto thread_copy = TiledLoad{}.get_slice(threadIdx.x);
    const Tensor source = thread_copy.partition_S(gmem_tile<kRows, kCols>(head_, row_begin, row_stride_));
    Tensor target = thread_copy.partition_D(smem);  // (CPY, CPY_M, CPY_K)
    const Tensor coords = thread_copy.partition_S(make_identity_tensor(Shape<Int<kRows>, Int<kCols>>{}));
    CUTE_UNROLL
    for (int m = 0; m < size<1>(target); ++m) {
      const bool row_in = bounds_.contains(row_begin + static_cast<int>(get<0>(coords(0, m, 0))));
      CUTE_UNROLL
      for (int k = 0; k < size<2>(target); ++k) {
        const bool column_in = static_cast<int>(get<1>(coords(0, m, k))) < num_cols_;
        copy(TiledLoad{}.with(row_in && column_in), source(_, m, k), target(_, m, k));
      }
    }
  }

 private:
  const Element* head_;
  int64_t row_stride_;
  Bounds bounds_;
  int num_cols_;
};

// Rows that lie apart: `Rows::row(i)` is where row i begins, for any i below `num_rows`, of which there is one at
// least.
template <class Traits, int kRows, int kCols, class Rows>
class ScatteredTileLoader {
 public:
  using Element = typename Traits::Element;
  using TiledLoad = typename Traits::template Access<kCols>::TiledLoad;

  __device__ ScatteredTileLoader(const Rows& rows, int num_rows, int num_cols)
      : rows_(rows), num_rows_(num_rows), num_cols_(num_cols) {}

  template <class SmemTensor>
  __device__ void load(int row_begin, SmemTensor&& smem) const {
    const auto thread_copy = TiledLoad{}.get_slice(threadIdx.x);
    Tensor target = thread_copy.partition_D(smem);  // (CPY, CPY_M, CPY_K)
    const Tensor coords = thread_copy.partition_S(make_identity_tensor(Shape<Int<kRows>, Int<kCols>>{}));
    constexpr int kRowsPerThread = decltype(size<1>(target))::value;
    CUTE_UNROLL
    for (int m = 0; m < kRowsPerThread; ++m) {
      const int row_idx = row_begin + static_cast<int>(get<0>(coords(0, m, 0)));
      const bool row_in = row_idx < num_rows_;
      const Element* row = rows_.row(min(row_idx, num_rows_ - 1));
      CUTE_UNROLL
      for (int k = 0; k < size<2>(target); ++k) {
        const int column = get<1>(coords(0, m, k));
        const Tensor source = make_tensor(make_gmem_ptr(row + column), make_layout(shape(target(_, m, k))));
        copy(TiledLoad{}.with(row_in && column < num_cols_), source, target(_, m, k));
      }
    }
  }

 private:
  Rows rows_;
  int num_rows_;
  int num_cols_;
};

}  // namespace flash_attn::sm80

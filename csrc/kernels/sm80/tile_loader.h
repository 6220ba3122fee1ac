// Brings tiles of rows from global to swizzled shared memory with cp.async. Rows out of bounds and columns past the
// head dim are filled with zeros and not read.
#pragma once

#include "kernels/common/kv_range.h"
#include "kernels/common/tensor.h"
#include "kernels/sm80/instructions.h"
#include "kernels/sm80/row_access.h"

namespace flash_attn::sm80 {

using namespace cute;

// The rows of a sequence.
class RowsBelow {
 public:
  __device__ RowsBelow(int end) : end_(end) {}
  __device__ bool contains(int row) const { return row < end_; }

 private:
  int end_;
};

// The rows of a sequence that are seen. There is at least one.
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
  using Access = typename Traits::template Access<kCols>;

  __device__ TileLoader(const Element* head, int64_t row_stride, const Bounds& bounds, int num_cols)
      : head_(head), row_stride_(row_stride), bounds_(bounds), num_cols_(num_cols) {}

  // Starts the copy of rows [row_begin, row_begin + kRows) to `smem`; the caller fences and waits.
  __device__ void load(int row_begin, Element* smem) const {
    const auto target = Access::template place_in<kRows>(smem);
    const Element* first =
        head_ + static_cast<int64_t>(row_begin + Access::row_of_pass(0)) * row_stride_ + Access::col_of_part(0);
    CUTE_UNROLL
    for (int pass = 0; pass < Access::template num_passes<kRows>(); ++pass) {
      const bool row_in = bounds_.contains(row_begin + Access::row_of_pass(pass));
      const Element* source = as_base(first + pass * Access::kRowsPerPass * row_stride_);
      CUTE_UNROLL
      for (int part = 0; part < Access::kNumParts; ++part) {
        AsyncCopy::copy(as_vector(source + part * Access::kPartCols),
                        as_vector(target.at(pass * Access::kRowsPerPass, part * Access::kPartCols)),
                        row_in && Access::col_of_part(part) < num_cols_);
      }
    }
  }

 private:
  const Element* head_;
  int64_t row_stride_;
  Bounds bounds_;
  int num_cols_;
};

// Rows that lie apart: `Rows::row(i)` is where row i begins, for any i below `num_rows`, which is at least 1.
template <class Traits, int kRows, int kCols, class Rows>
class ScatteredTileLoader {
 public:
  using Element = typename Traits::Element;
  using Access = typename Traits::template Access<kCols>;

  __device__ ScatteredTileLoader(const Rows& rows, int num_rows, int num_cols)
      : rows_(rows), num_rows_(num_rows), num_cols_(num_cols) {}

  __device__ void load(int row_begin, Element* smem) const {
    const auto target = Access::template place_in<kRows>(smem);
    CUTE_UNROLL
    for (int pass = 0; pass < Access::template num_passes<kRows>(); ++pass) {
      const int row_idx = row_begin + Access::row_of_pass(pass);
      const bool row_in = row_idx < num_rows_;
      const Element* source = rows_.row(min(row_idx, num_rows_ - 1)) + Access::col_of_part(0);
      CUTE_UNROLL
      for (int part = 0; part < Access::kNumParts; ++part) {
        AsyncCopy::copy(as_vector(source + part * Access::kPartCols),
                        as_vector(target.at(pass * Access::kRowsPerPass, part * Access::kPartCols)),
                        row_in && Access::col_of_part(part) < num_cols_);
      }
    }
  }

 private:
  Rows rows_;
  int num_rows_;
  int num_cols_;
};

}  // namespace flash_attn::sm80

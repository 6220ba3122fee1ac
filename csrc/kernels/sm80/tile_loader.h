// Brings tiles of rows from global to swizzled shared memory with cp.async. Rows past the sequence and columns past the
// head dim are filled with zeros and not read.
#pragma once

#include <cute/tensor.hpp>

#include "kernels/common/kv_rows.h"
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

template <class Traits, int kRows, int kCols>
class TileLoader {
 public:
  using Element = typename Traits::Element;
  using TiledLoad = typename Traits::template Access<kCols>::TiledLoad;

  __device__ TileLoader(const Element* head, int64_t row_stride, int num_rows, int num_cols)
      : head_(head), row_stride_(row_stride), num_rows_(num_rows), num_cols_(num_cols) {}

  // Starts the copy of rows [row_begin, row_begin + kRows) to `smem`; the caller fences and waits.
  template <class SmemTensor>
  __device__ void load(int row_begin, SmemTensor&& smem) const {
    const auto thread_copy = TiledLoad{}.get_slice(threadIdx.x);
    const Tensor source = thread_copy.partition_S(gmem_tile<kRows, kCols>(head_, row_begin, row_stride_));
    Tensor target = thread_copy.partition_D(smem);  // (CPY, CPY_M, CPY_K)
    const Tensor coords = thread_copy.partition_S(make_identity_tensor(Shape<Int<kRows>, Int<kCols>>{}));
    CUTE_UNROLL
    for (int m = 0; m < size<1>(target); ++m) {
      const bool row_in = row_begin + static_cast<int>(get<0>(coords(0, m, 0))) < num_rows_;
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
  int num_rows_;
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
    // All addresses before the first copy, so that the look-ups of a page table overlap.
    const Element* row[kRowsPerThread];
    CUTE_UNROLL
    for (int m = 0; m < kRowsPerThread; ++m) {
      row[m] = rows_.row(min(row_begin + static_cast<int>(get<0>(coords(0, m, 0))), num_rows_ - 1));
    }
    CUTE_UNROLL
    for (int m = 0; m < kRowsPerThread; ++m) {
      const bool row_in = row_begin + static_cast<int>(get<0>(coords(0, m, 0))) < num_rows_;
      CUTE_UNROLL
      for (int k = 0; k < size<2>(target); ++k) {
        const int column = get<1>(coords(0, m, k));
        const Tensor source = make_tensor(make_gmem_ptr(row[m] + column), make_layout(shape(target(_, m, k))));
        copy(TiledLoad{}.with(row_in && column < num_cols_), source, target(_, m, k));
      }
    }
  }

 private:
  Rows rows_;
  int num_rows_;
  int num_cols_;
};

// K or V. The test for pages is compiled only into the kernels that may meet them.
template <class Traits, int kCols>
class KvTileLoader {
 public:
  using Element = typename Traits::Element;
  static constexpr bool kMayHavePages = Traits::kMask == Mask::kGeneral;

  __device__ KvTileLoader(const KvRows<Element>& rows, int num_rows, int num_cols)
      : rows_(rows), num_rows_(num_rows), num_cols_(num_cols) {}

  template <class SmemTensor>
  __device__ void load(int row_begin, SmemTensor&& smem) const {
    if constexpr (kMayHavePages) {
      if (rows_.in_pages()) {
        ScatteredTileLoader<Traits, Traits::kTileN, kCols, KvRows<Element>>(rows_, num_rows_, num_cols_)
            .load(row_begin, smem);
        return;
      }
    }
    TileLoader<Traits, Traits::kTileN, kCols>(rows_.head(), rows_.row_stride(), num_rows_, num_cols_)
        .load(row_begin, smem);
  }

 private:
  KvRows<Element> rows_;
  int num_rows_;
  int num_cols_;
};

}  // namespace flash_attn::sm80

// Brings tiles of rows from global to swizzled shared memory with cp.async. Rows past the sequence and columns past the
// head dim are filled with zeros and not read.
#pragma once

#include <cute/tensor.hpp>

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

}  // namespace flash_attn::sm80

// Which parts of a tile's rows each thread moves between shared and global memory.
#pragma once

#include <cute/config.hpp>
#include <cute/numeric/numeric_types.hpp>
#include <type_traits>

#include "kernels/common/smem_tile.h"

namespace flash_attn::sm80 {

using namespace cute;

// How a thread block reads and writes rows of kCols elements in global memory: neighbouring threads take neighbouring
// 16 bytes of a row's part, and go on from row to row, then from part to part.
template <class Element, int kNumThreads, int kCols>
struct RowAccess {
  static constexpr int kPartCols = block_cols(kCols);
  static constexpr int kNumParts = kCols / kPartCols;
  static constexpr int kThreadsPerRow = kPartCols / kVectorElements;
  static constexpr int kRowsPerPass = kNumThreads / kThreadsPerRow;
  static_assert(kNumThreads % kThreadsPerRow == 0 && kRowsPerPass % 8 == 0, "TilePlace::at takes multiples of 8 rows");

  template <int kRows>
  static constexpr int num_passes() {
    static_assert(kRows % kRowsPerPass == 0, "a pass would go beyond the tile's end");
    return kRows / kRowsPerPass;
  }

  static __device__ int row_of_pass(int pass) { return threadIdx.x / kThreadsPerRow + pass * kRowsPerPass; }
  static __device__ int col_of_part(int part) {
    return threadIdx.x % kThreadsPerRow * kVectorElements + part * kPartCols;
  }
  // This thread's place in a tile, its first pass and part.
  template <int kRows>
  static __device__ auto place_in(Element* tile) {
    return TilePlace<Element, SmemTile<kRows, kCols>>(tile, row_of_pass(0), col_of_part(0));
  }
};

// The 16 bytes that begin at an element.
template <class Element>
CUTE_DEVICE auto& as_vector(Element* element) {
  using Vector = std::conditional_t<std::is_const_v<Element>, const uint128_t, uint128_t>;
  return *reinterpret_cast<Vector*>(element);
}

}  // namespace flash_attn::sm80

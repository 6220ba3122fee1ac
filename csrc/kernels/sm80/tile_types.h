// Tiles in shared memory, and which parts of a tile's rows each thread moves between them and global memory.
#pragma once

#include <cute/config.hpp>
#include <cute/numeric/numeric_types.hpp>
#include <type_traits>

#include "variant/tiles.h"

namespace flash_attn::sm80 {

using namespace cute;

// Columns of a row that are together in shared memory, and that neighbouring threads take from global memory.
constexpr int block_cols(int cols) { return cols % 64 == 0 ? 64 : 32; }

// A tile of rows in shared memory: blocks of columns one after another, in each of them row after row. The pieces of 16
// bytes of a block's row are permuted, so that neither rows as a whole nor the eight pieces of ldmatrix meet in a bank.
template <int kRowsValue, int kColsValue>
struct SmemTile {
  static constexpr int kRows = kRowsValue;
  static constexpr int kCols = kColsValue;
  static constexpr int kSize = kRows * kCols;
  static constexpr int kBlockCols = block_cols(kCols);
  static constexpr int kBlockSize = kRows * kBlockCols;
  static_assert(kCols % kBlockCols == 0 && kRows % 8 == 0);

  // What the column within a block is combined with by exclusive or.
  static __device__ int permutation(int row) { return (kBlockCols == 64 ? row % 8 : row / 2 % 4) * kVectorElements; }
};

// One lane's element of a tile, and those at distances known when compiled.
template <class Element, class Tile>
class TilePlace {
 public:
  static_assert(sizeof(Element) == kElementBytes);

  __device__ TilePlace(Element* tile, int row, int col)
      : permuted_col_((col % Tile::kBlockCols) ^ Tile::permutation(row)),
        place_(tile + col / Tile::kBlockCols * Tile::kBlockSize + row * Tile::kBlockCols + permuted_col_) {}

  // So many rows further on, a multiple of 8, and so many columns: a multiple of 8 and of a power of two above the
  // lane's own column in its block, so that the two share no bit.
  __device__ Element* at(int rows, int cols) const {
    constexpr int kBlockCols = Tile::kBlockCols;
    Element* place = place_ + rows * kBlockCols + cols / kBlockCols * Tile::kBlockSize;
    // An exclusive or, bit by bit: sums cost fewer registers than the four pointers that it would come to.
    CUTE_UNROLL
    for (int bit = kVectorElements; bit < kBlockCols; bit *= 2) {
      if (cols & bit) place += (permuted_col_ & bit) ? -bit : bit;
    }
    return place;
  }

 private:
  int permuted_col_;  // in its block
  Element* place_;
};

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

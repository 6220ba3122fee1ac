// Swizzled tiles in shared memory.
#pragma once

#include <cute/config.hpp>

#include "variant/tiles.h"

namespace flash_attn {

// Columns of a row that lie together in shared memory: what neighbouring threads, or one box of TMA, take from global
// memory.
constexpr int block_cols(int cols) { return cols % 64 == 0 ? 64 : 32; }

// A swizzled tile: blocks of columns one after another, in each of them row after row. The 16-byte pieces of a block's
// row are permuted, so that neither a whole row nor the eight rows of one of ldmatrix's matrices conflict in a bank.
template <int kRowsValue, int kColsValue>
struct SmemTile {
  static constexpr int kRows = kRowsValue;
  static constexpr int kCols = kColsValue;
  static constexpr int kSize = kRows * kCols;
  static constexpr int kBlockCols = block_cols(kCols);
  static constexpr int kBlockSize = kRows * kBlockCols;
  static_assert(kCols % kBlockCols == 0 && kRows % 8 == 0);

  // The swizzle: what the column within a block is XORed with.
  static __device__ int permutation(int row) { return (kBlockCols == 64 ? row % 8 : row / 2 % 4) * kVectorElements; }
};

// A lane's element of a tile, and those at compile-time distances from it.
template <class Element, class Tile>
class TilePlace {
 public:
  static_assert(sizeof(Element) == kElementBytes);

  __device__ TilePlace(Element* tile, int row, int col)
      : permuted_col_((col % Tile::kBlockCols) ^ Tile::permutation(row)),
        place_(tile + col / Tile::kBlockCols * Tile::kBlockSize + row * Tile::kBlockCols + permuted_col_) {}

  // The element `rows` further down, a multiple of 8, and `cols` further right: a multiple of 8 and of a power of two
  // above the lane's own column in its block, so that the two columns share no bit.
  __device__ Element* at(int rows, int cols) const {
    constexpr int kBlockCols = Tile::kBlockCols;
    Element* place = place_ + rows * kBlockCols + cols / kBlockCols * Tile::kBlockSize;
    // The XOR bit by bit: sums cost fewer registers than the four pointers that it would make otherwise.
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

}  // namespace flash_attn

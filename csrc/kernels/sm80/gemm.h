// Warp-level matrix products whose operands come from shared memory through ldmatrix, one step ahead of the tensor
// cores.
#pragma once

#include "kernels/common/tensor.h"
#include "kernels/sm80/instructions.h"
#include "kernels/sm80/row_access.h"
#include "kernels/sm80/warp_mma.h"

namespace flash_attn::sm80 {

using namespace cute;

// A lane's registers of 16 x 16 blocks of an operand that lie side by side, for one step of the product.
template <int kNumBlocksValue>
struct OperandBlocks {
  static constexpr int kNumBlocks = kNumBlocksValue;
  uint32_t registers[kNumBlocks][4];
};

// Which operand of A B'.
enum class Side { kA, kB };
// kRows: a row of the tile is a row of the operand. kCols: a column of the tile is one, and ldmatrix transposes.
enum class Along { kRows, kCols };

// A warp's part of an operand in shared memory.
template <class Mma, Side kSide, Along kAlong, class Element, class Tile>
class SmemOperand {
 public:
  static constexpr int kExtent = kAlong == Along::kRows ? Tile::kRows : Tile::kCols;
  static constexpr int kDepth = kAlong == Along::kRows ? Tile::kCols : Tile::kRows;
  static constexpr int kBlockStride = kSide == Side::kA ? Mma::kRowStep : 2 * Mma::kColStep;
  static constexpr int kNumBlocks = kExtent / kBlockStride;
  static constexpr int kNumSteps = kDepth / kMmaDepth;
  static_assert(kExtent % kBlockStride == 0, "the operand doesn't divide over the warps");
  static_assert(kDepth % kMmaDepth == 0, "the depth is no whole number of instructions");
  using Blocks = OperandBlocks<kNumBlocks>;

  __device__ explicit SmemOperand(Element* tile) : place_(first_place(tile)) {}

  __device__ Blocks load(int step) const {
    Blocks blocks;
    CUTE_UNROLL
    for (int i = 0; i < kNumBlocks; ++i) {
      auto& to = blocks.registers[i];
      if constexpr (kAlong == Along::kRows) {
        LoadMatrix::copy(as_vector(place_.at(i * kBlockStride, step * kMmaDepth)), to[0], to[1], to[2], to[3]);
      } else {
        LoadMatrixTransposed::copy(as_vector(place_.at(step * kMmaDepth, i * kBlockStride)), to[0], to[1], to[2],
                                   to[3]);
      }
    }
    return blocks;
  }

 private:
  // ldmatrix takes the addresses of the eight rows of its i-th 8 x 8 matrix from the i-th eight lanes:
  //   matrix                       0   1   2   3
  //   A: half of rows, of depth   00  10  01  11
  //   B: instruction, half        00  01  10  11
  static __device__ TilePlace<Element, Tile> first_place(Element* tile) {
    constexpr bool kIsA = kSide == Side::kA;
    const int matrix = threadIdx.x % kThreadsPerWarp / 8;
    const int part = kIsA ? matrix % 2 : matrix / 2;
    const int depth_half = kIsA ? matrix / 2 : matrix % 2;
    const int first = kIsA ? Mma::warp_m(threadIdx.x) * kMmaRows + part * 8
                           : Mma::warp_n(threadIdx.x) * kMmaCols + part * Mma::kColStep;
    const int row_of_matrix = threadIdx.x % 8;
    if constexpr (kAlong == Along::kRows) return {tile, first + row_of_matrix, depth_half * 8};
    return {tile, depth_half * 8 + row_of_matrix, first};
  }

  TilePlace<Element, Tile> place_;
};

template <class Mma, Along kAlong, class Tile, class Element>
CUTE_DEVICE auto operand_a(Element* tile) {
  return SmemOperand<Mma, Side::kA, kAlong, Element, Tile>(tile);
}

template <class Mma, Along kAlong, class Tile, class Element>
CUTE_DEVICE auto operand_b(Element* tile) {
  return SmemOperand<Mma, Side::kB, kAlong, Element, Tile>(tile);
}

// A product's accumulator, rounded, as the A operand of the next: two instructions' columns make one step's depth. (As
// a class's member, P was once copied by nvcc 13.0, at a tenth of the speed: look for moves in the loop after a
// change.)
template <class Rounded>  // (MMA, MMA_M, MMA_N)
class RegisterOperand {
 public:
  static constexpr int kNumBlocks = size<1>(typename Rounded::layout_type{});
  static constexpr int kNumSteps = size<2>(typename Rounded::layout_type{}) / 2;
  static_assert(size<2>(typename Rounded::layout_type{}) % 2 == 0, "two instructions' columns make a step");
  using Blocks = OperandBlocks<kNumBlocks>;

  __device__ explicit RegisterOperand(const Rounded& rounded) : rounded_(rounded) {}

  __device__ Blocks load(int step) const {
    const Tensor pairs = recast<const uint32_t>(rounded_);  // (row pair, MMA_M, MMA_N)
    Blocks blocks;
    CUTE_UNROLL
    for (int i = 0; i < kNumBlocks; ++i) {
      CUTE_UNROLL
      for (int pair = 0; pair < 4; ++pair) blocks.registers[i][pair] = pairs(pair % 2, i, 2 * step + pair / 2);
    }
    return blocks;
  }

 private:
  Rounded rounded_;
};

// acc += A B' of one step. The order goes back and forth along A, whose registers then serve twice in a row.
template <class Mma, class Acc, class BlocksA, class BlocksB>
CUTE_DEVICE void multiply_step(Acc& acc, const BlocksA& a, const BlocksB& b) {
  constexpr int kRows = BlocksA::kNumBlocks;
  constexpr int kCols = 2 * BlocksB::kNumBlocks;
  CUTE_UNROLL
  for (int n = 0; n < kCols; ++n) {
    CUTE_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const int m = n % 2 == 0 ? i : kRows - 1 - i;
      const auto& rows = a.registers[m];
      const uint32_t* cols = &b.registers[n / 2][n % 2 * 2];
      Mma::Instruction::fma(acc(0, m, n), acc(1, m, n), acc(2, m, n), acc(3, m, n), rows[0], rows[1], rows[2], rows[3],
                            cols[0], cols[1], acc(0, m, n), acc(1, m, n), acc(2, m, n), acc(3, m, n));
    }
  }
}

// acc += A B'.
template <class Mma, class Acc, class OperandA, class OperandB>
CUTE_DEVICE void gemm(Acc& acc, const OperandA& a, const OperandB& b) {
  static_assert(OperandA::kNumSteps == OperandB::kNumSteps, "A and B differ in depth");
  static_assert(size<1>(typename Acc::layout_type{}) == OperandA::kNumBlocks &&
                    size<2>(typename Acc::layout_type{}) == 2 * OperandB::kNumBlocks,
                "the operands are another product's");
  typename OperandA::Blocks a_blocks[OperandA::kNumSteps];
  typename OperandB::Blocks b_blocks[OperandB::kNumSteps];
  a_blocks[0] = a.load(0);
  b_blocks[0] = b.load(0);
  CUTE_UNROLL
  for (int step = 0; step < OperandA::kNumSteps; ++step) {
    if (step + 1 < OperandA::kNumSteps) {
      a_blocks[step + 1] = a.load(step + 1);
      b_blocks[step + 1] = b.load(step + 1);
    }
    multiply_step<Mma>(acc, a_blocks[step], b_blocks[step]);
  }
}

}  // namespace flash_attn::sm80

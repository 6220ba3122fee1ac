// The instructions that a warp's lanes execute together, on values that they hold in registers.
#pragma once

#include <cstdint>

namespace flash_attn::emulator {

enum class MatrixOrder { kRows, kTransposed };

// What a lane brings to mma.m16n8k16, and takes from it.
struct MmaOperands {
  uint32_t a[4];
  uint32_t b[2];
  float sums[4];
};

// Element is cutlass::half_t or cutlass::bfloat16_t.
template <class Element>
void multiply_matrices(MmaOperands& own);

// ldmatrix of four 8 x 8 matrices of 16-bit elements: `row` is the address of one of the 32 rows.
template <MatrixOrder kOrder>
void load_matrices(const void* row, uint32_t (&own)[4]);

// stmatrix, the reverse by rows.
void store_matrices(const uint32_t (&own)[4], void* row);

}  // namespace flash_attn::emulator

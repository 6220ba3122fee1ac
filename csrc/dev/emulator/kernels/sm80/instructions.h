// The emulator's part of the instructions that the SM80 kernels are made of.
#pragma once

#include <cutlass/bfloat16.h>
#include <cutlass/half.h>

#include <cute/numeric/numeric_types.hpp>

#include "dev/emulator/async_copies.h"
#include "dev/emulator/warp_instructions.h"

namespace flash_attn::sm80 {

template <class Element>
struct Mma {
  static void fma(float& d0, float& d1, float& d2, float& d3, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                  uint32_t b0, uint32_t b1, float c0, float c1, float c2, float c3) {
    emulator::MmaOperands operands{{a0, a1, a2, a3}, {b0, b1}, {c0, c1, c2, c3}};
    emulator::multiply_matrices<Element>(operands);
    d0 = operands.sums[0];
    d1 = operands.sums[1];
    d2 = operands.sums[2];
    d3 = operands.sums[3];
  }
};
using MmaFp16 = Mma<cutlass::half_t>;
using MmaBf16 = Mma<cutlass::bfloat16_t>;

template <emulator::MatrixOrder kOrder>
struct LoadMatrices {
  static void copy(const cute::uint128_t& row, uint32_t& d0, uint32_t& d1, uint32_t& d2, uint32_t& d3) {
    uint32_t own[4];
    emulator::load_matrices<kOrder>(&row, own);
    d0 = own[0];
    d1 = own[1];
    d2 = own[2];
    d3 = own[3];
  }
};
using LoadMatrix = LoadMatrices<emulator::MatrixOrder::kRows>;
using LoadMatrixTransposed = LoadMatrices<emulator::MatrixOrder::kTransposed>;

struct AsyncCopy {
  static void copy(const cute::uint128_t& from, cute::uint128_t& smem, bool reads) {
    emulator::start_async_copy(&smem, &from, reads);
  }
};

inline void cp_async_fence() { emulator::commit_async_copies(); }

template <int kNumGroupsLeft>
void cp_async_wait() {
  if constexpr (kNumGroupsLeft == 0) {
    emulator::wait_for_all_async_copies();
  } else {
    emulator::wait_for_async_copies(kNumGroupsLeft);
  }
}

inline int thread_idx_anew() { return threadIdx.x; }

}  // namespace flash_attn::sm80

// The emulator's part of the instructions that the SM80 kernels are made of.
#pragma once

#include <cutlass/bfloat16.h>
#include <cutlass/half.h>

#include <cute/arch/copy_sm80.hpp>
#include <cute/atom/copy_traits_sm75.hpp>
#include <cute/atom/copy_traits_sm80.hpp>
#include <cute/atom/mma_traits_sm80.hpp>

#include "dev/emulator/async_copies.h"
#include "dev/emulator/warp_instructions.h"

namespace flash_attn::sm80 {

template <class Element>
struct Mma {
  using DRegisters = float[4];
  using ARegisters = uint32_t[4];
  using BRegisters = uint32_t[2];
  using CRegisters = float[4];

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
  using SRegisters = cute::uint128_t[1];
  using DRegisters = uint32_t[4];

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

using AsyncCopy = cute::SM80_CP_ASYNC_CACHEGLOBAL_ZFILL<cute::uint128_t>;

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

namespace cute {

template <>
struct SM80_CP_ASYNC_CACHEGLOBAL_ZFILL<uint128_t, uint128_t> {
  using SRegisters = uint128_t[1];
  using DRegisters = uint128_t[1];

  static void copy(const uint128_t& from, uint128_t& smem, bool reads) {
    flash_attn::emulator::start_async_copy(&smem, &from, reads);
  }
};

// Which lane holds what is the hardware's.
template <>
struct MMA_Traits<flash_attn::sm80::MmaFp16> : MMA_Traits<SM80_16x8x16_F32F16F16F32_TN> {};
template <>
struct MMA_Traits<flash_attn::sm80::MmaBf16> : MMA_Traits<SM80_16x8x16_F32BF16BF16F32_TN> {};
template <>
struct Copy_Traits<flash_attn::sm80::LoadMatrix> : Copy_Traits<SM75_U32x4_LDSM_N> {};
template <>
struct Copy_Traits<flash_attn::sm80::LoadMatrixTransposed> : Copy_Traits<SM75_U16x8_LDSM_T> {};

}  // namespace cute

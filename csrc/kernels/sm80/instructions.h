// The machine instructions that the SM80 kernels are made of, as CuTe operations. csrc/dev/emulator has a header of the
// same name, whose operations run on the CPU.
#pragma once

#include <cute/arch/copy_sm75.hpp>
#include <cute/arch/copy_sm80.hpp>
#include <cute/arch/mma_sm80.hpp>

namespace flash_attn::sm80 {

// mma.m16n8k16 with sums in float32.
using MmaFp16 = cute::SM80_16x8x16_F32F16F16F32_TN;
using MmaBf16 = cute::SM80_16x8x16_F32BF16BF16F32_TN;

// ldmatrix of four 8 x 8 matrices.
using LoadMatrix = cute::SM75_U32x4_LDSM_N;
using LoadMatrixTransposed = cute::SM75_U16x8_LDSM_T;

// cp.async of 16 bytes, which are zeros and not read where its predicate is false.
using AsyncCopy = cute::SM80_CP_ASYNC_CACHEGLOBAL_ZFILL<cute::uint128_t>;
using cute::cp_async_fence;
using cute::cp_async_wait;

// threadIdx.x, read each time: what a loop computes from it is computed in each step and occupies no register in
// between.
__device__ inline int thread_idx_anew() {
  int idx;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(idx));
  return idx;
}

}  // namespace flash_attn::sm80

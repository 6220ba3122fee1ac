// Warp-level matrix products whose operands come from shared memory through ldmatrix, one step ahead of the tensor
// cores.
#pragma once

#include <cute/tensor.hpp>

namespace flash_attn::sm80 {

using namespace cute;

// acc += A B, both operands in shared memory.
template <class TiledMma, class Acc, class FragA, class FragB, class SmemA, class SmemB, class CopyA, class CopyB>
CUTE_DEVICE void gemm_smem_smem(const TiledMma& mma, Acc& acc, FragA& a, FragB& b, const SmemA& smem_a,
                                const SmemB& smem_b, const CopyA& copy_a, const CopyB& copy_b) {
  Tensor a_view = copy_a.get_slice(threadIdx.x).retile_D(a);  // (CPY, MMA_M, MMA_K)
  Tensor b_view = copy_b.get_slice(threadIdx.x).retile_D(b);  // (CPY, MMA_N, MMA_K)
  copy(copy_a, smem_a(_, _, _0{}), a_view(_, _, _0{}));
  copy(copy_b, smem_b(_, _, _0{}), b_view(_, _, _0{}));
  CUTE_UNROLL
  for (int k = 0; k < size<2>(a); ++k) {
    if (k + 1 < size<2>(a)) {
      copy(copy_a, smem_a(_, _, k + 1), a_view(_, _, k + 1));
      copy(copy_b, smem_b(_, _, k + 1), b_view(_, _, k + 1));
    }
    gemm(mma, a(_, _, k), b(_, _, k), acc);
  }
}

// acc += A B, A in registers, B in shared memory.
template <class TiledMma, class Acc, class FragA, class FragB, class SmemB, class CopyB>
CUTE_DEVICE void gemm_register_smem(const TiledMma& mma, Acc& acc, const FragA& a, FragB& b, const SmemB& smem_b,
                                    const CopyB& copy_b) {
  Tensor b_view = copy_b.get_slice(threadIdx.x).retile_D(b);  // (CPY, MMA_N, MMA_K)
  copy(copy_b, smem_b(_, _, _0{}), b_view(_, _, _0{}));
  CUTE_UNROLL
  for (int k = 0; k < size<2>(a); ++k) {
    if (k + 1 < size<2>(a)) copy(copy_b, smem_b(_, _, k + 1), b_view(_, _, k + 1));
    gemm(mma, a(_, _, k), b(_, _, k), acc);
  }
}

// acc += A B with nothing kept between calls. A is (M, K) and B is (N, K), in shared memory; each copy atom is
// ldmatrix, transposed where its operand's memory is.
template <class Mma, class CopyAtomA, class CopyAtomB, class Acc, class SmemA, class SmemB>
CUTE_DEVICE void gemm_tiles(Acc& acc, const SmemA& sA, const SmemB& sB) {
  Mma mma;
  const auto thread_mma = mma.get_slice(threadIdx.x);
  Tensor a = thread_mma.partition_fragment_A(sA);  // (MMA, MMA_M, MMA_K)
  Tensor b = thread_mma.partition_fragment_B(sB);  // (MMA, MMA_N, MMA_K)
  const auto copy_a = make_tiled_copy_A(CopyAtomA{}, mma);
  const auto copy_b = make_tiled_copy_B(CopyAtomB{}, mma);
  gemm_smem_smem(mma, acc, a, b, copy_a.get_slice(threadIdx.x).partition_S(sA),
                 copy_b.get_slice(threadIdx.x).partition_S(sB), copy_a, copy_b);
}

}  // namespace flash_attn::sm80

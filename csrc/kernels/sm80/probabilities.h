// P on its way from the accumulator of the first product to the A operand of the second.
#pragma once

#include <cute/tensor.hpp>

#include "kernels/common/fragment_layout.h"
#include "kernels/sm80/gemm.h"

namespace flash_attn::sm80 {

using namespace cute;

// A warp owns all columns: what it holds of P is what it needs, in registers. (State in a member, rather than passed
// from put to multiply, made nvcc 13.0 copy it: a tenth of the speed.)
template <class Traits>
struct RegisterProbabilities {
  template <class Scores>
  static __device__ auto put(typename Traits::SharedStorage&, const Scores& tSrS) {
    return convert_to<typename Traits::Element>(tSrS);
  }

  // acc += P V
  template <class Acc, class Probs, class FragV, class SmemV, class CopyV>
  static __device__ void multiply(Acc& acc, const Probs& tSrP, FragV& tOrV, const SmemV& tOsV, const CopyV& copy_v) {
    const Tensor tOrP = make_tensor(tSrP.data(), as_a_operand(tSrP.layout()));
    gemm_register_smem(typename Traits::TiledMma{}, acc, tOrP, tOrV, tOsV, copy_v);
  }
};

// Warps share rows: P goes through shared memory. The caller has a barrier between put and multiply, and one between
// multiply and the next put.
template <class Traits>
struct SharedProbabilities {
  template <class Scores>
  static __device__ auto put(typename Traits::SharedStorage& smem, const Scores& tSrS) {
    using Element = typename Traits::Element;
    Tensor sP = make_tensor(make_smem_ptr(smem.p), typename Traits::SmemLayoutP{});
    const auto to_smem = make_tiled_copy_C(Copy_Atom<AutoVectorizingCopyWithAssumedAlignment<32>, Element>{},
                                           typename Traits::TiledMma{});
    const auto thread_to_smem = to_smem.get_slice(threadIdx.x);
    const Tensor rounded = convert_to<Element>(tSrS);
    copy(to_smem, thread_to_smem.retile_S(rounded), thread_to_smem.partition_D(sP));
    return sP;
  }

  // acc += P V
  template <class Acc, class SmemP, class FragV, class SmemV, class CopyV>
  static __device__ void multiply(Acc& acc, const SmemP& sP, FragV& tOrV, const SmemV& tOsV, const CopyV& copy_v) {
    typename Traits::TiledMma mma;
    Tensor tOrP = mma.get_slice(threadIdx.x).partition_fragment_A(sP);  // (MMA, MMA_M, MMA_K)
    const auto copy_p = make_tiled_copy_A(typename Traits::SmemCopyAtom{}, mma);
    const Tensor tOsP = copy_p.get_slice(threadIdx.x).partition_S(sP);
    gemm_smem_smem(mma, acc, tOrP, tOrV, tOsP, tOsV, copy_p, copy_v);
  }
};

template <class Traits>
using Probabilities =
    std::conditional_t<(Traits::kWarpsN > 1), SharedProbabilities<Traits>, RegisterProbabilities<Traits>>;

}  // namespace flash_attn::sm80

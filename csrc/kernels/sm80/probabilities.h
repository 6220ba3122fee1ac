// P on its way from the accumulator of the first product to the A operand of the second.
#pragma once

#include <cute/tensor.hpp>

#include "kernels/common/fragment_layout.h"
#include "kernels/sm80/gemm.h"

namespace flash_attn::sm80 {

using namespace cute;

// A warp owns all columns: what it holds of P is what it needs, in registers.
template <class Traits>
class RegisterProbabilities {
 public:
  __device__ explicit RegisterProbabilities(typename Traits::SharedStorage&) {}

  template <class Scores>
  __device__ void put(const Scores& tSrS) {
    const Tensor rounded = convert_to<typename Traits::Element>(tSrS);
    copy(rounded, fragment_);
  }

  // acc += P V
  template <class Acc, class FragV, class SmemV, class CopyV>
  __device__ void multiply(Acc& acc, FragV& tOrV, const SmemV& tOsV, const CopyV& copy_v) {
    const Tensor tOrP = make_tensor(fragment_.data(), as_a_operand(fragment_.layout()));
    gemm_register_smem(typename Traits::TiledMma{}, acc, tOrP, tOrV, tOsV, copy_v);
  }

 private:
  using ScoreShape = Shape<Int<Traits::kTileM>, Int<Traits::kTileN>>;
  using Fragment = decltype(make_tensor<typename Traits::Element>(
      shape(partition_fragment_C(typename Traits::TiledMma{}, ScoreShape{}))));
  Fragment fragment_;
};

// Warps share rows: P goes through shared memory. The caller has a barrier between put and multiply, and one between
// multiply and the next put.
template <class Traits>
class SharedProbabilities {
 public:
  __device__ explicit SharedProbabilities(typename Traits::SharedStorage& smem)
      : sP_(make_tensor(make_smem_ptr(smem.p), typename Traits::SmemLayoutP{})) {}

  template <class Scores>
  __device__ void put(const Scores& tSrS) {
    using Element = typename Traits::Element;
    const auto to_smem = make_tiled_copy_C(Copy_Atom<AutoVectorizingCopyWithAssumedAlignment<32>, Element>{},
                                           typename Traits::TiledMma{});
    const auto thread_to_smem = to_smem.get_slice(threadIdx.x);
    const Tensor rounded = convert_to<Element>(tSrS);
    copy(to_smem, thread_to_smem.retile_S(rounded), thread_to_smem.partition_D(sP_));
  }

  // acc += P V
  template <class Acc, class FragV, class SmemV, class CopyV>
  __device__ void multiply(Acc& acc, FragV& tOrV, const SmemV& tOsV, const CopyV& copy_v) {
    typename Traits::TiledMma mma;
    Tensor tOrP = mma.get_slice(threadIdx.x).partition_fragment_A(sP_);  // (MMA, MMA_M, MMA_K)
    const auto copy_p = make_tiled_copy_A(typename Traits::SmemCopyAtom{}, mma);
    const Tensor tOsP = copy_p.get_slice(threadIdx.x).partition_S(sP_);
    gemm_smem_smem(mma, acc, tOrP, tOrV, tOsP, tOsV, copy_p, copy_v);
  }

 private:
  using SmemTensor = decltype(make_tensor(make_smem_ptr(static_cast<typename Traits::Element*>(nullptr)),
                                          typename Traits::SmemLayoutP{}));
  SmemTensor sP_;
};

template <class Traits>
using Probabilities =
    std::conditional_t<(Traits::kWarpsN > 1), SharedProbabilities<Traits>, RegisterProbabilities<Traits>>;

}  // namespace flash_attn::sm80

// P on its way from the accumulator of the first product to the A operand of the second.
#pragma once

#include "kernels/common/convert.h"
#include "kernels/sm80/gemm.h"
#include "kernels/sm80/tile_store.h"

namespace flash_attn::sm80 {

using namespace cute;

// Where a warp owns all columns, what it holds of P is what it needs, in registers. Warps that share rows exchange P in
// shared memory: the caller has a barrier between this and the product, and one between the product and the next P.
template <class Traits, class Scores>
__device__ auto as_probability_operand(typename Traits::SharedStorage& smem, const Scores& tSrS) {
  if constexpr (Traits::kWarpsN > 1) {
    round_to_smem<typename Traits::Mma, Traits::kTileM, Traits::kTileN>(smem.p, tSrS);
    return operand_a<typename Traits::Mma, Along::kRows, typename Traits::TileP>(smem.p);
  } else {
    return RegisterOperand(convert_to<typename Traits::Element>(tSrS));
  }
}

}  // namespace flash_attn::sm80

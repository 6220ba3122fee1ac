// Starts an SM80 backward kernel. Each variant is instantiated in a file that variants.py generates.
#pragma once

#include "kernels/common/launch.h"
#include "kernels/common/start_kernel.h"
#include "kernels/sm80/backward_kernel.h"

namespace flash_attn::sm80 {

template <BackwardVariant kVariant>
cudaError_t launch_backward(const BackwardParams& params, const BackwardLaunchConfig& config) {
  using Traits = BackwardTraits<kVariant>;
  constexpr int kSmemBytes = sizeof(typename Traits::SharedStorage);
  constexpr int kStoreSmemBytes = Traits::kTileM * Traits::kColumns * sizeof(typename Traits::Element);
  static_assert(kStoreSmemBytes <= SmemOptIn::kWithoutOptIn);
  const auto kernel = &backward_kernel<Traits>;
  static SmemOptIn smem_opt_in;
  const cudaError_t error = smem_opt_in.apply(reinterpret_cast<const void*>(kernel), kSmemBytes);
  if (error != cudaSuccess) return error;
  if (config.num_key_blocks > 0) {
    start_kernel(kernel, {config.num_key_blocks, Traits::kNumThreads, kSmemBytes, config.stream}, params);
  }
  if (config.num_query_blocks > 0) {
    start_kernel(&store_dq_kernel<Traits>,
                 {config.num_query_blocks, Traits::kNumThreads, kStoreSmemBytes, config.stream}, params);
  }
  return cudaGetLastError();
}

}  // namespace flash_attn::sm80

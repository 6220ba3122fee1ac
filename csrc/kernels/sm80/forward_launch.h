// Starts an SM80 forward kernel. Each variant is instantiated in a file that variants.py generates.
#pragma once

#include "kernels/common/launch.h"
#include "kernels/common/start_kernel.h"
#include "kernels/misc/merge_splits.h"
#include "kernels/sm80/few_rows_kernel.h"
#include "kernels/sm80/forward_kernel.h"

namespace flash_attn::sm80 {

template <class Traits>
constexpr auto forward_kernel_of() {
  if constexpr (Traits::kFewRows) {
    return &few_rows_kernel<Traits>;
  } else {
    return &forward_kernel<Traits>;
  }
}

template <Variant kVariant>
cudaError_t launch_forward(const ForwardParams& params, const ForwardLaunchConfig& config) {
  using Traits = ForwardTraits<kVariant>;
  constexpr int kSmemBytes = sizeof(typename Traits::SharedStorage);
  const auto kernel = forward_kernel_of<Traits>();
  static SmemOptIn smem_opt_in;
  const cudaError_t error = smem_opt_in.apply(reinterpret_cast<const void*>(kernel), kSmemBytes);
  if (error != cudaSuccess) return error;
  start_kernel(kernel, {config.num_blocks, Traits::kNumThreads, kSmemBytes, config.stream}, params);
  if (params.split.entries != nullptr)
    return launch_merge_splits(params, kVariant.dtype, Traits::kTileM, config.stream);
  return cudaGetLastError();
}

}  // namespace flash_attn::sm80

// Starts an SM80 forward kernel. Each variant is instantiated in a file of its own, which variants.py generates.
#pragma once

#include "kernels/common/launch.h"
#include "kernels/common/start_kernel.h"
#include "kernels/sm80/forward_kernel.h"

namespace flash_attn::sm80 {

template <Variant kVariant>
cudaError_t launch_forward(const ForwardParams& params, const LaunchConfig& config) {
  using Traits = ForwardTraits<kVariant>;
  constexpr int kSmemBytes = sizeof(typename Traits::SharedStorage);
  const auto kernel = &forward_kernel<Traits>;
  static SmemOptIn smem_opt_in;
  const cudaError_t error = smem_opt_in.apply(reinterpret_cast<const void*>(kernel), kSmemBytes);
  if (error != cudaSuccess) return error;
  start_kernel(kernel, {config.num_blocks, Traits::kNumThreads, kSmemBytes, config.stream}, params);
  return cudaGetLastError();
}

}  // namespace flash_attn::sm80

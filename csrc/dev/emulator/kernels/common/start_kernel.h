// Runs a kernel where CUDA would start it.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "dev/emulator/thread_block.h"

namespace flash_attn {

struct KernelLaunch {
  int num_blocks;
  int num_threads;
  int smem_bytes;
  cudaStream_t stream;
};

template <class... Params>
void start_kernel(void (*kernel)(Params...), const KernelLaunch& launch,
                  const std::type_identity_t<Params>&... params) {
  emulator::run_blocks({launch.num_blocks, launch.num_threads, launch.smem_bytes}, [&] { kernel(params...); });
}

template <class... Params>
cudaError_t start_clusters(void (*kernel)(Params...), const KernelLaunch& launch, int cluster_blocks,
                           const std::type_identity_t<Params>&... params) {
  emulator::run_blocks({launch.num_blocks, launch.num_threads, launch.smem_bytes, cluster_blocks},
                       [&] { kernel(params...); });
  return cudaSuccess;
}

}  // namespace flash_attn

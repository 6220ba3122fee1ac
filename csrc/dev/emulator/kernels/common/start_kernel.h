// Runs a kernel where CUDA would start it.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "dev/emulator/thread_block.h"
#include "dev/emulator/translated.h"

namespace flash_attn {

struct KernelLaunch {
  int num_blocks;
  int num_threads;
  int smem_bytes;
  cudaStream_t stream;
};

namespace emulator {

template <class... Params>
void run_kernel(void (*kernel)(Params...), Launch launch, const Params&... params) {
  if (const TranslatedKernel* translated = find_translated(reinterpret_cast<const void*>(kernel))) {
    const void* const addresses[] = {&params...};
    launch.smem_bytes += translated->static_smem_bytes;
    run_blocks(launch, [&] { translated->run_thread(addresses); });
  } else {
    run_blocks(launch, [&] { kernel(params...); });
  }
}

}  // namespace emulator

template <class... Params>
void start_kernel(void (*kernel)(Params...), const KernelLaunch& launch,
                  const std::type_identity_t<Params>&... params) {
  emulator::run_kernel<Params...>(kernel, {launch.num_blocks, launch.num_threads, launch.smem_bytes}, params...);
}

template <class... Params>
cudaError_t start_clusters(void (*kernel)(Params...), const KernelLaunch& launch, int cluster_blocks,
                           const std::type_identity_t<Params>&... params) {
  emulator::run_kernel<Params...>(kernel, {launch.num_blocks, launch.num_threads, launch.smem_bytes, cluster_blocks},
                                  params...);
  return cudaSuccess;
}

}  // namespace flash_attn

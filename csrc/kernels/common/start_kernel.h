// The one place where CUDA starts a kernel. csrc/dev/emulator has a header of the same name, which runs it on the CPU.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

namespace flash_attn {

struct KernelLaunch {
  int num_blocks;
  int num_threads;  // of each block
  int smem_bytes;   // dynamic shared memory of each
  cudaStream_t stream;
};

// Errors are left for cudaGetLastError.
template <class... Params>
void start_kernel(void (*kernel)(Params...), const KernelLaunch& launch,
                  const std::type_identity_t<Params>&... params) {
  kernel<<<launch.num_blocks, launch.num_threads, launch.smem_bytes, launch.stream>>>(params...);
}

// The same in clusters: so many thread blocks run at once, side by side, and reach each other's shared memory.
template <class... Params>
cudaError_t start_clusters(void (*kernel)(Params...), const KernelLaunch& launch, int cluster_blocks,
                           const std::type_identity_t<Params>&... params) {
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = static_cast<unsigned>(cluster_blocks);
  cluster.val.clusterDim.y = 1;
  cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(launch.num_blocks));
  config.blockDim = dim3(static_cast<unsigned>(launch.num_threads));
  config.dynamicSmemBytes = static_cast<size_t>(launch.smem_bytes);
  config.stream = launch.stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, params...);
}

}  // namespace flash_attn

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

}  // namespace flash_attn

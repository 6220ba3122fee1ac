// How the host reaches a kernel: a launch function per variant, and the generated table of those that were built.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

#include "kernels/common/backward_params.h"
#include "kernels/common/params.h"
#include "variant/backward_tiles.h"

namespace flash_attn {

struct LaunchConfig {
  int num_blocks;
  int cluster_blocks;  // that the planner counted with
  cudaStream_t stream;
};

// Lets one kernel have more dynamic shared memory than the 48 KB that every launch may have. CUDA is asked once per
// device, not once per launch: on an H200's machine that takes as long as a tenth of a small call.
class SmemOptIn {
 public:
  static constexpr int kWithoutOptIn = 48 * 1024;

  cudaError_t apply(const void* kernel, int bytes) {
    if (bytes <= kWithoutOptIn) return cudaSuccess;
    int device = 0;
    if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
    // Devices past the word's bits are asked every time.
    const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
    if (devices_.load(std::memory_order_relaxed) & bit) return cudaSuccess;
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error == cudaSuccess) devices_.fetch_or(bit, std::memory_order_relaxed);
    return error;
  }

 private:
  std::atomic<uint64_t> devices_{0};
};

using ForwardLaunch = cudaError_t (*)(const ForwardParams&, const LaunchConfig&);

struct ForwardKernel {
  Variant variant;
  ForwardLaunch launch;
};

// The built kernels; defined in the file that variants.py generates.
struct ForwardKernels {
  const ForwardKernel* begin;
  const ForwardKernel* end;
};
ForwardKernels built_forward_kernels();

struct BackwardLaunchConfig {
  int num_key_blocks;    // of dK, dV and the sums of dQ
  int num_query_blocks;  // of dQ
  cudaStream_t stream;
};

using BackwardLaunch = cudaError_t (*)(const BackwardParams&, const BackwardLaunchConfig&);

struct BackwardKernel {
  BackwardVariant variant;
  BackwardLaunch launch;
};

struct BackwardKernels {
  const BackwardKernel* begin;
  const BackwardKernel* end;
};
BackwardKernels built_backward_kernels();

inline BackwardLaunch find_backward_kernel(const BackwardVariant& variant) {
  const BackwardKernels kernels = built_backward_kernels();
  for (const BackwardKernel* kernel = kernels.begin; kernel != kernels.end; ++kernel) {
    if (kernel->variant == variant) return kernel->launch;
  }
  return nullptr;
}

inline ForwardLaunch find_forward_kernel(const Variant& variant) {
  const ForwardKernels kernels = built_forward_kernels();
  for (const ForwardKernel* kernel = kernels.begin; kernel != kernels.end; ++kernel) {
    if (kernel->variant == variant) return kernel->launch;
  }
  return nullptr;
}

}  // namespace flash_attn
